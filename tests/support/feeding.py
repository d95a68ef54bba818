"""Texts fed to the tiny Llama in many ways: what layers were given and stored, and the truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_calibration.pipeline import calibrate
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.sidecar import Sidecar
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.dequantize import apply_scales
from kvq_runtime.attach import AttachRule, attach
from kvq_runtime.cache import packed_layers
from kvq_runtime.layer import PackedLayer
from rounding import Stored, Tally, explain_keys, explain_values, paged
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

PROMPT = torch.randint(3, 300, (1, 777), generator=torch.Generator().manual_seed(0))
TOKENS = PROMPT.shape[1]
CHUNKS = [1, 7, 64, 256, 300]


@cache
def model() -> LlamaForCausalLM:
    return make_tiny_llama()


@cache
def exact_model() -> LlamaForCausalLM:
    return copy.deepcopy(model()).double()


@cache
def sidecar(name: str) -> Sidecar:
    """Calibrated so that pools and lists are full; or ``roomy``, so that ``|z| = 1`` decides."""
    if name == "roomy":
        return make_sidecar(3, half_range=3.5, value_capacity_factor=2.0)
    bits, _, grain = name.partition(" ")
    given = make_sidecar(
        int(bits),
        outlier_fraction=0.05,
        value_capacity_factor=1.0,
        value_grain=grain or "token",
        recent_tokens=20 if bits == "4" else 0,
        sensitivity="none",
    )
    windows = torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    return calibrate(
        model(),
        windows,
        given.config,
        base_model=given.base_model,
        calibration=given.calibration,
        batch_size=4,
    )


SIDECARS = ["2", "3 head", "4", "roomy"]


@dataclass(frozen=True)
class Fed:
    """What came of a feeding.

    Fields:
        logits: ``[T, vocabulary]``.
        inputs: keys (before RoPE) and values that each layer was given to store, ``[H, T, D]``.
        layers: the layers of its cache.
    """

    logits: Tensor
    inputs: list[tuple[Tensor, Tensor]]
    layers: list[PackedLayer]

    def pages(self, layer: int) -> list[Any]:
        """Key and value pages of a layer; none where no page is complete."""
        stored = self.layers[layer]
        return [pages for both in stored.pool.read(stored.rows[0].pages) for pages in both]


@contextmanager
def recording(
    held: Fed | None = None, *, plainly: bool = False
) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Note what layers are given to store; let them store what ``held`` was given instead.

    ``plainly``: and let them attend to that, and to the pages of ``held``, in the plain way.
    """
    stock, layers, seen = PackedLayer.append, [], []

    def append(layer: PackedLayer, keys: Tensor, values: Tensor, **options: Any) -> None:
        if layer not in layers:
            layers.append(layer)
            seen.append([])
        index = layers.index(layer)
        seen[index].append((keys[0], values[0]))
        if held is not None:
            place = slice(layer.slots, layer.slots + keys.shape[2])
            keys, values = (x[None, :, place].to(keys.dtype) for x in held.inputs[index])
        stock(layer, keys, values, **options)

    def attend(layer: PackedLayer, query: Tensor, options: AttentionOptions, **_: Any) -> Tensor:
        assert held is not None
        index = layers.index(layer)
        return plain_attention(query[0], held.inputs[index], held.pages(index), layer, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLayer, "append", append)
        if plainly:
            patch.setattr(PackedLayer, "attend", attend)
        yield seen


def plain_attention(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    pages: list[Any],
    layer: PackedLayer,
    options: AttentionOptions,
) -> Tensor:
    """One softmax over all tokens of a text, ``[1, T, HQ, D]``, in the dtype of the query."""
    HQ, T, _ = query.shape
    codec = layer.codec
    first, recent, count = codec.sink_tokens, codec.recent_tokens, pages[0].words.shape[0]
    angles = codec.rotary.angles()
    turn = torch.arange(T).double()[:, None] * angles.frequencies
    decoded = codec.decode_keys(pages[0]), apply_scales(*codec.decode_values(pages[1]))
    scores, values = [], []
    for coded in (False, True):
        keys, value = (x.double() for x in exact)
        if coded:
            for x, page in zip((keys, value), decoded, strict=True):
                x[:, first : first + count * PAGE_TOKENS] = page.transpose(0, 1).flatten(1, 2)
        x1, x2 = keys.chunk(2, dim=-1)
        keys = torch.cat([x1 * turn.cos() - x2 * turn.sin(), x2 * turn.cos() + x1 * turn.sin()], -1)
        keys, value = (x.to(query.dtype).repeat_interleave(HQ // len(x), 0) for x in (keys, value))
        scores.append(options.scaling * query @ keys.mT)
        values.append(value)
    n, token = torch.arange(T)[:, None], torch.arange(T)
    ends = first + (token - first) // PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS - 1
    coded = (token >= first) & (ends < n - recent)
    weights = torch.where(coded, scores[1], scores[0])
    weights = weights.masked_fill(token > n, -torch.inf).softmax(-1)
    output = (weights * ~coded) @ values[0] + (weights * coded) @ values[1]
    return output.transpose(0, 1)[None]


def joined(seen: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    return [tuple(torch.cat(parts, dim=1) for parts in zip(*fed, strict=True)) for fed in seen]


@torch.no_grad()
def feed(
    given: Sidecar,
    size: int,
    ids: Tensor = PROMPT,
    *,
    llama: LlamaForCausalLM | None = None,
    held: Fed | None = None,
    plainly: bool = False,
    rule: AttachRule = "runtime",
    whole_first: int = 0,
) -> Fed:
    """Feed ``ids`` in chunks of ``size``, the first ``whole_first`` tokens in one."""
    llama, logits, past = llama or model(), [], None
    head, tail = ids.split([whole_first, ids.shape[1] - whole_first], dim=1)
    with attach(llama, given, rule=rule), recording(held, plainly=plainly) as seen:
        for chunk in ([head] if whole_first else []) + list(tail.split(size, dim=1)):
            out = llama(chunk, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits.append(out.logits[0])
    return Fed(torch.cat(logits), joined(seen), list(packed_layers(past)))


@cache
def whole(name: str) -> Fed:
    return feed(sidecar(name), TOKENS)


def misses(found: Fed, truth: Fed) -> list[float]:
    """Largest distances from the truth: keys and values of each layer, logits."""
    numbers, true = (
        [x for both in fed.inputs for x in both] + [fed.logits] for fed in (found, truth)
    )
    return [float((x - y).abs().max()) for x, y in zip(numbers, true, strict=True)]


@cache
def truth(name: str) -> Fed:
    return feed(sidecar(name), TOKENS, llama=exact_model(), held=whole(name), plainly=True)


@cache
def plain_misses(name: str) -> list[float]:
    """M, of keys and values of each layer and of logits."""
    return misses(feed(sidecar(name), TOKENS, held=whole(name), plainly=True), truth(name))


def near(x: Tensor, y: Tensor, bound: Tensor | float) -> Tally:
    differences = (x - y).abs()
    return Tally(x.numel(), 0, int((differences > 0).sum()), int((differences > bound).sum()))


def compare(a: Fed, b: Fed, name: str) -> dict[str, Tally]:
    """Everything that two feedings computed and stored, layer by layer.

    Pages are compared given what they were made of. A layer's inputs, and the logits, are compared
    up to the first token that read a page of an earlier layer which differs from its twin.
    """
    *input_misses, logit_misses = plain_misses(name)
    tallies: dict[str, Tally] = {}
    same = a.logits.shape[0]
    for index, layer in enumerate(a.layers):
        assert b.layers[index].rows == layer.rows
        for place, (x, y) in enumerate(zip(a.inputs[index], b.inputs[index], strict=True)):
            bound = 4 * input_misses[2 * index + place]
            tallies[f"{index} {('keys', 'values')[place]}"] = near(x[:, :same], y[:, :same], bound)
        if layer.rows[0].pages:
            found, differing = compare_pages(a, b, index)
            tallies |= {f"{index} {kind}": tally for kind, tally in found.items()}
            for page in differing[:1]:
                end = layer.codec.sink_tokens + PAGE_TOKENS * (page + 1)
                same = min(same, end + layer.codec.recent_tokens)
    tallies["logits"] = near(a.logits[:same], b.logits[:same], 4 * logit_misses)
    return tallies


def compare_pages(a: Fed, b: Fed, index: int) -> tuple[dict[str, Tally], list[int]]:
    """The pages of one layer, and which of them differ."""
    codec, count = a.layers[index].codec, len(a.layers[index].rows[0].pages)
    keys, values = (
        tuple(paged(x, sinks=codec.sink_tokens, pages=count) for x in twins)
        for twins in zip(a.inputs[index], b.inputs[index], strict=True)
    )
    key_pages, value_pages = zip(a.pages(index), b.pages(index), strict=True)
    tallies = explain_keys(keys, key_pages, codec.parameters.key, codec.config)
    tallies |= explain_values(values, value_pages, codec.parameters.value, codec.config)

    twins = [tuple(vars(p).values()) for both in (key_pages, value_pages) for p in both]
    alike = [
        all(torch.equal(x[p], y[p]) for k in (0, 2) for x, y in zip(*twins[k : k + 2], strict=True))
        for p in range(count)
    ]
    equal = [all(torch.equal(x[p], y[p]) for x, y in (keys, values)) for p in range(count)]
    broken = sum(e and not a for e, a in zip(equal, alike, strict=True))
    tallies["pages of equal tokens"] = Tally(sum(equal), 0, broken, broken)

    # What was stored alike is read alike, to the bit.
    scaled = (value_pages[0].scales == value_pages[1].scales).all(-1, keepdim=True)
    for kind, pages, where, decode in (
        ("key", key_pages, True, codec.decode_keys),
        ("value", value_pages, scaled, lambda p: apply_scales(*codec.decode_values(p))),
    ):
        stored = [Stored.of(p) for p in pages]
        read = (stored[0].same(stored[1]) & where).double()
        x, y = (decode(p) * read for p in pages)
        tallies[f"{kind} read"] = near(x, y, 0.0)
    return tallies, [p for p in range(count) if not alike[p]]


def unexplained(tallies: dict[str, Tally]) -> dict[str, Tally]:
    return {kind: tally for kind, tally in tallies.items() if tally.unexplained}
