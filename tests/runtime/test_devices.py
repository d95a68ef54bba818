"""Each layer's cache on its layer's device: a model spread over three gives the bits of one.

The devices are pretended (``support/labelled_devices.py``): they have the numbers of the CPU, so
that nothing but the place of a tensor can make a difference, and what mixes places raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_formats.sidecar import Sidecar
from kvq_kernels.rotary import RotaryAngles
from kvq_runtime.attach import AttachRule, attach
from kvq_runtime.cache import PackedCache, cache_bytes, packed_layers
from kvq_runtime.forward import Forward
from kvq_runtime.page_codec import SidecarPageCodec
from labelled_devices import labelled_devices
from spread_models import held_tensors, layer_devices, spread
from tiny_models import make_tiny_family, make_tiny_llama
from tiny_sidecars import make_sidecar

CAPACITY = 900
PADDING = 100
TEXT = torch.randint(3, 190, (2, CAPACITY), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TEXT)
MASK[0, :PADDING] = 0
# They jump in the second page, which is then one that names its positions.
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0) + 5 * (torch.arange(CAPACITY) >= 400)


@cache
def stock(family: str) -> tuple[PreTrainedModel, Sidecar]:
    """A model on the CPU; fused attention is picked by device, so that it has none."""
    if family == "llama":
        model: PreTrainedModel = make_tiny_llama(num_hidden_layers=3)
    else:
        more = {"sliding_window": 64, "head_dim": 16, "num_hidden_layers": 4}
        options: dict[str, Any] = more if family == "gemma2" else {}
        model = make_tiny_family(
            family, max_position_embeddings=1024, attn_implementation="eager", **options
        )
    return model, make_sidecar(3, model=model, recent_tokens=20)


@dataclass(frozen=True)
class Fed:
    """Logits of each forward, on the CPU, and the cache at the end."""

    logits: list[Tensor]
    cache: PackedCache


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    sidecar: Sidecar,
    *,
    rule: AttachRule = "runtime",
    capacity: int | None = None,
) -> Fed:
    """A padded prompt of over two pages, a chunk, steps, a crop, rows in another order."""
    first = model.get_input_embeddings().weight.device
    text, mask, positions = (x.to(first) for x in (TEXT, MASK, POSITIONS))
    held = PackedCache(model, sidecar, capacity=capacity, batch_size=2) if capacity else None
    logits: list[Tensor] = []
    stop = 0

    def forward(tokens: int) -> None:
        nonlocal held, stop
        start, stop = stop, stop + tokens
        out = model(
            text[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=held,
            use_cache=True,
        )
        held = out.past_key_values
        logits.append(out.logits.cpu())

    with attach(model, sidecar, rule=rule, impl="reference"):
        for tokens in (540, 260, 1, 1):
            forward(tokens)
        assert held is not None
        # Windows do not give back what has left them.
        if not any(held.is_sliding):
            held.crop(-300)
            stop -= 300
        forward(40)
        order = torch.tensor([1, 0], device=first)
        held.reorder_cache(order)
        text, mask, positions = (x[order] for x in (text, mask, positions))
        forward(1)
    return Fed(logits, held)


@pytest.mark.parametrize(
    ("family", "devices", "rule", "capacity"),
    [
        ("llama", 3, "runtime", None),
        ("qwen2", 2, "exact-prefill", CAPACITY),
        ("gemma2", 3, "runtime", None),
    ],
)
def test_the_bits_of_one_device(
    family: str, devices: int, rule: AttachRule, capacity: int | None
) -> None:
    model, sidecar = stock(family)
    expected = feed(model, sidecar, rule=rule, capacity=capacity)
    with labelled_devices():
        scattered = spread(model, devices)
        found = feed(scattered, sidecar, rule=rule, capacity=capacity)
        where = layer_devices(scattered)
        assert len(set(where)) == devices
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert torch.equal(one, other)
        assert found.cache.allocated_bytes == expected.cache.allocated_bytes
        assert found.cache.held_bytes == expected.cache.held_bytes
        assert found.cache.tokens_held == expected.cache.tokens_held
        if capacity is not None:
            config = {"capacity": capacity, "batch_size": 2, "dtype": torch.float32}
            irregular = sum(x.pool.irregular_positions.nbytes for x in packed_layers(found.cache))
            counted = cache_bytes(model.config, sidecar, **config)
            assert found.cache.allocated_bytes == counted + irregular
        for layer_idx in sidecar.layers:
            ours, theirs = (held_tensors(run.cache.layers[layer_idx]) for run in (found, expected))
            check_held(ours, theirs, where[layer_idx])


def check_held(ours: dict[str, Tensor], theirs: dict[str, Tensor], device: torch.device) -> None:
    """All of a layer's tensors lie on its device, and hold what they hold on the CPU."""
    assert {".block_table", ".exact.keys", ".pool.slabs.0.key.words"} <= set(ours)
    assert any(name.startswith(".codec.keys") for name in ours)
    assert any(name.startswith(".codec.values") for name in ours)
    assert len(ours[".pool.irregular_positions"]) > 0
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.device == device, name
        # Lines that no page uses have any contents.
        if name != ".pool.irregular_positions":
            bits = (x.cpu().contiguous().view(torch.uint8) for x in (tensor, theirs[name]))
            assert torch.equal(*bits), name


def placed_nowhere(self: Any, _device: torch.device) -> Any:
    return self


def tables_anywhere(self: RotaryAngles, device: torch.device) -> Any:
    known = next(iter(self._on_device), device)
    return angle_tables(self, known)


angle_tables = RotaryAngles._tables


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (Forward, "on", placed_nowhere),
        (SidecarPageCodec, "to", placed_nowhere),
        (RotaryAngles, "_tables", tables_anywhere),
        (None, "kvq_runtime.cache.layer_placement", lambda *_: ("cuda:0", torch.float32)),
    ],
)
@labelled_devices()
def test_what_stays_on_the_first_device_is_found(
    owner: Any, name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sidecar = stock("llama")
    if owner is None:
        monkeypatch.setattr(name, broken)
    else:
        monkeypatch.setattr(owner, name, broken)
    with pytest.raises(RuntimeError, match="same device"):
        feed(spread(model, 3), sidecar, capacity=CAPACITY)


def test_generate_with_beams() -> None:
    model, sidecar = stock("llama")
    found = []
    for context in (nullcontext(), labelled_devices()):
        with context:
            chosen = model if isinstance(context, nullcontext) else spread(model, 3)
            device = chosen.get_input_embeddings().weight.device
            with attach(chosen, sidecar, impl="reference"):
                tokens = chosen.generate(
                    TEXT[:, :300].to(device),
                    attention_mask=MASK[:, :300].to(device),
                    max_new_tokens=6,
                    do_sample=False,
                    num_beams=2,
                )
            assert tokens.device == device
            found.append(tokens.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize(("family", "recent_tokens"), [("llama", 0), ("gemma2", 20)])
@torch.no_grad()
def test_the_evaluation_rule(family: str, recent_tokens: int) -> None:
    model, _ = stock(family)
    sidecar = make_sidecar(3, model=model, recent_tokens=recent_tokens)

    def logits(model: PreTrainedModel, device: str) -> Tensor:
        text, mask = (x[:, :400].to(device) for x in (TEXT, MASK))
        with attach(model, sidecar, rule="evaluation"):
            return model(text, attention_mask=mask).logits.cpu()

    expected = logits(model, "cpu")
    with labelled_devices():
        assert torch.equal(logits(spread(model, 3), "cuda:0"), expected)
