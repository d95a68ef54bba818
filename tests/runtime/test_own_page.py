"""The runtime rule for any codec: what a query reads exactly, at the borders of pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.attach import attach
from kvq_runtime.evaluation_rule import QUERY_BLOCK, attach_codec, partly_exact_attention
from kvq_runtime.sidecar_codec import SidecarCodec
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

EPS = torch.finfo(torch.float32).eps
SINKS = 2


@dataclass
class Wrecked:
    """Decodes tokens of ``[first, last)`` after the sinks to nonsense, the others to themselves."""

    first: int = 0
    last: int = 10**9
    scale: float = -3.0
    sink_tokens: int = SINKS
    recent_tokens: int = 0
    rotated_keys: bool = False
    layers: tuple[int, ...] = (0, 1)
    lengths: list[int] = field(default_factory=list)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        self.lengths.append(keys.shape[1])
        return self.decoded_values(layer_idx, keys)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        decoded = values.clone()
        decoded[:, self.first : self.last] *= self.scale
        return decoded


def random_ids(rows: int, tokens: int, *, seed: int = 4) -> Tensor:
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def moved(model: LlamaForCausalLM, ids: Tensor, codec: Wrecked) -> list[bool]:
    """Which queries of one row give other logits than the stock model."""
    stock = model(ids).logits
    with attach_codec(model, codec, rule="runtime"):
        found = model(ids).logits
    difference = (found - stock).abs().amax(-1)[0]
    # fp32 sums over some 500 numbers in another order, in each of two layers.
    rounding = 1024 * EPS * float(stock.abs().max()) * 8
    assert ((difference <= rounding) | (difference > 4 * rounding)).all()
    return (difference > rounding).tolist()


def page_of(token: int, sinks: int = SINKS) -> int:
    return (token - sinks) // PAGE_TOKENS


def reads_codes(query: int, token: int, *, recent: int) -> bool:
    """The rule, said once more: of an earlier page that ended before the recent tokens."""
    if token < SINKS or token > query:
        return False
    end_of_page = SINKS + PAGE_TOKENS * (page_of(token) + 1) - 1
    return query - recent > end_of_page


# After the sinks: a page but one token, a page, one token more; the same with two pages.
SIZES = [pages * PAGE_TOKENS + more for pages in (1, 2) for more in (-1, 0, 1)]


@pytest.mark.parametrize("recent", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_codes_change_what_the_rule_says_and_nothing_else(
    tiny_llama: LlamaForCausalLM, size: int, recent: int
) -> None:
    tokens = SINKS + size + recent
    expected = [
        any(reads_codes(query, token, recent=recent) for token in range(tokens))
        for query in range(tokens)
    ]
    assert any(expected) == (size > PAGE_TOKENS)
    codec = Wrecked(recent_tokens=recent)
    assert moved(tiny_llama, random_ids(1, tokens), codec) == expected
    # Sinks are no matter of the codec.
    assert set(codec.lengths) == {tokens - SINKS}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0, 1),
        (PAGE_TOKENS - 1, PAGE_TOKENS),
        (PAGE_TOKENS, PAGE_TOKENS + 1),
        (2 * PAGE_TOKENS - 1, 2 * PAGE_TOKENS),
        (2 * PAGE_TOKENS, 3 * PAGE_TOKENS),
    ],
)
def test_a_page_is_read_from_codes_by_later_pages_only(
    tiny_llama: LlamaForCausalLM, first: int, last: int, rotated: bool
) -> None:
    """One token of a page is wrecked, at either end of it; or all of the last, incomplete page."""
    recent = 2
    tokens = SINKS + 2 * PAGE_TOKENS + recent + 5
    codec = Wrecked(first, last, scale=-30.0, recent_tokens=recent, rotated_keys=rotated)
    # Only the first layer: the second would pass on what moved.
    codec.layers = (0,)
    wrecked = range(SINKS + first, min(SINKS + last, tokens))
    expected = [
        any(reads_codes(query, token, recent=recent) for token in wrecked)
        for query in range(tokens)
    ]
    assert moved(tiny_llama, random_ids(1, tokens), codec) == expected


@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize("padding", [1, 7])
@torch.no_grad()
def test_padding_enters_no_page(tiny_llama: LlamaForCausalLM, recent: int, padding: int) -> None:
    tokens = SINKS + PAGE_TOKENS + recent + 4
    ids = random_ids(2, tokens + padding)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    codec = Wrecked(scale=0.5, recent_tokens=recent)
    with attach_codec(tiny_llama, codec, rule="runtime"):
        batch = tiny_llama(ids, attention_mask=mask, position_ids=positions).logits
        alone = tiny_llama(ids[:1, padding:]).logits
        other = tiny_llama(ids[1:]).logits
    stock = tiny_llama(ids[:1, padding:]).logits
    bound = 1024 * EPS * stock.abs().max() * 8
    assert (batch[0, padding:] - alone[0]).abs().max() <= bound
    assert (batch[1] - other[0]).abs().max() <= bound
    # The last four queries of the padded row read its first page from codes, no other does.
    first = tokens - 4
    assert (alone[:, first:] - stock[:, first:]).abs().amax(-1).min() > 4 * bound
    assert (alone[:, :first] - stock[:, :first]).abs().max() <= bound


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_it_is_what_the_packed_cache_reads(size: int, recent: int, bits: int) -> None:
    """Of one layer, whose numbers are the same in both, and so are their codes."""
    model = make_tiny_llama(num_hidden_layers=1)
    sidecar = make_sidecar(bits, model=model, sink_tokens=SINKS, recent_tokens=recent)
    ids = random_ids(1, SINKS + size + recent)
    with attach(model, sidecar, rule="runtime"):
        packed = model(ids).logits
    with attach_codec(model, SidecarCodec(sidecar), rule="runtime"):
        found = model(ids).logits
    stock = model(ids).logits
    bound = 512 * EPS * stock.abs().max() * 8
    assert (found - packed).abs().max() <= bound
    changed = (packed - stock).abs().amax(-1) > 4 * bound
    assert int(changed.sum()) == max(0, size - PAGE_TOKENS)


# The attention itself.


def attended_one_by_one(
    query: Tensor,
    decoded: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    *,
    exact_until: Tensor,
    order: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """Query by query in f64, ``[B, T, HQ, D]``; zeros where the query is padding."""
    B, HQ, T, D = query.shape
    groups = HQ // decoded[0].shape[1]
    output = torch.zeros(B, T, HQ, D, dtype=torch.float64)
    for row in range(B):
        for head in range(HQ):
            for place in range(T):
                seen = [i for i in range(place + 1) if mask[row, i]]
                if not mask[row, place]:
                    continue
                pairs = [
                    exact if order[row, place] <= exact_until[row, i] else decoded for i in seen
                ]
                keys, values = (
                    torch.stack(
                        [
                            pair[what][row, head // groups, i]
                            for i, pair in zip(seen, pairs, strict=True)
                        ]
                    ).double()
                    for what in (0, 1)
                )
                weights = (keys @ query[row, head, place].double() * scaling).softmax(0)
                output[row, place, head] = weights @ values
    return output


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), T=st.integers(1, 12), padding=st.integers(0, 4))
def test_attention_against_a_loop(seed: int, T: int, padding: int) -> None:
    """Any exact reach of any token, grouped heads, padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, T, 8, generator=generator)
    decoded, exact = (
        (
            torch.randn(2, 2, T, 8, generator=generator),
            torch.randn(2, 2, T, 8, generator=generator),
        )
        for _ in range(2)
    )
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, : min(padding, T - 1)] = False
    order = mask.cumsum(-1) - 1
    exact_until = torch.randint(-1, T + 2, (2, T), generator=generator)
    given_mask = None if mask.all() else mask
    found = partly_exact_attention(
        query,
        decoded,
        exact,
        exact_until=exact_until,
        order=order,
        mask=given_mask,
        options={"scaling": 0.4},
    )
    expected = attended_one_by_one(
        query, decoded, exact, exact_until=exact_until, order=order, mask=mask, scaling=0.4
    )
    attended = mask[:, :, None, None]
    # Sums of 8 products, then of at most 12 weights.
    assert ((found - expected) * attended).abs().max() <= 128 * EPS


def test_queries_go_block_by_block() -> None:
    """At the border of a block of queries as everywhere else."""
    T = QUERY_BLOCK + 3
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, T, 4, generator=generator)
    decoded, exact = (
        (
            torch.randn(1, 1, T, 4, generator=generator),
            torch.randn(1, 1, T, 4, generator=generator),
        )
        for _ in range(2)
    )
    order = torch.arange(T)[None]
    options = {"exact_until": order + 9, "order": order}
    found = partly_exact_attention(query, decoded, exact, mask=None, options={}, **options)
    expected = attended_one_by_one(
        query, decoded, exact, mask=torch.ones(1, T, dtype=torch.bool), scaling=4**-0.5, **options
    )
    assert (found - expected).abs().max() <= 512 * EPS


def test_the_output_has_the_dtype_of_the_query() -> None:
    query = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    pair = (query[:, :2], query[:, 2:])
    order = torch.arange(5)[None]
    options = {"exact_until": order, "order": order, "mask": None, "options": {}}
    exact = partly_exact_attention(query, pair, pair, **options)
    half = partly_exact_attention(
        query.bfloat16(), *((pair[0].bfloat16(), pair[1].bfloat16()),) * 2, **options
    )
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() <= 2.0**-6 * exact.abs().max()
