"""What kernels are given lies on their layer's device, and that device is the current one.

They run in Triton's interpreter, on pretended devices (``support/labelled_kernels.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import KVQError
from kvq_formats.sidecar import Sidecar
from kvq_kernels.availability import interprets
from kvq_kernels.decode import decode
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache, packed_layers
from kvq_runtime.captured_decode import CapturedDecode
from kvq_runtime.layer_kernels import LayerKernels
from kvq_runtime.page_codec import unrotated_codecs
from labelled_devices import labelled_devices
from labelled_kernels import labelled_kernels
from spread_models import layer_devices, spread
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

pytestmark = pytest.mark.skipif(not interprets(), reason="devices are pretended to the interpreter")

# More than sinks and a tail, so that a page is packed.
PROMPT = 258
CAPACITY = 300
TEXT = torch.randint(3, 300, (1, CAPACITY), generator=torch.Generator().manual_seed(0))
# They jump inside the page, which then names its positions.
POSITIONS = (torch.arange(CAPACITY) + 3 * (torch.arange(CAPACITY) > 100))[None]


@cache
def stock() -> tuple[LlamaForCausalLM, Sidecar]:
    model = make_tiny_llama(num_attention_heads=2, num_key_value_heads=1)
    return model, make_sidecar(3, model=model)


@torch.no_grad()
def feed(model: Any, chunks: list[int], *, captured: int = 0) -> tuple[list[Tensor], PackedCache]:
    """Logits of each forward after the prompt, and the cache; the last ones are captured steps."""
    _, sidecar = stock()
    device = model.get_input_embeddings().weight.device
    text, positions = TEXT.to(device), POSITIONS.to(device)
    held = PackedCache(model, sidecar, capacity=CAPACITY)
    found, stop = [], 0

    def forward(tokens: int) -> None:
        nonlocal stop
        start, stop = stop, stop + tokens
        span = slice(start, stop)
        out = model(text[:, span], position_ids=positions[:, span], past_key_values=held)
        found.append(out.logits.cpu())

    with attach(model, sidecar, impl="reference"):
        forward(PROMPT)
    with attach(model, sidecar, impl="triton"):
        for tokens in chunks[: len(chunks) - captured]:
            forward(tokens)
        if captured:
            steps = CapturedDecode(model, held, capture=rerun(held))
            with steps:
                for tokens in chunks[len(chunks) - captured :]:
                    forward(tokens)
            assert steps.replays == captured
    assert [len(row.pages) for layer in packed_layers(held) for row in layer.rows] == [1, 1]
    assert all(layer.pool.irregular for layer in packed_layers(held))
    return found[1:], held


def rerun(held: PackedCache) -> Callable[..., Any]:
    """Captures nothing: a replay runs the step again, all of it."""

    class Again:
        result: Any = None

        def __init__(self, function: Callable[[], Any]) -> None:
            self.function = function

        def replay(self) -> None:
            # A graph does not ask whether the cache is whole.
            for layer in packed_layers(held):
                layer.torn = False
            self.result = self.function()

    def capture(
        function: Callable[[], Any], prepare: Callable[[], None], device: torch.device
    ) -> Again:
        assert device == torch.device("cuda:0")
        prepare()
        function()
        return Again(function)

    return capture


CHUNKS = [2, 1]


@cache
def expected() -> list[Tensor]:
    """On the CPU: a chunk and a step that read a page."""
    return feed(stock()[0], CHUNKS)[0]


@pytest.mark.parametrize(("devices", "captured"), [(2, 0), (1, 1)])
def test_the_bits_of_the_cpu(devices: int, captured: int) -> None:
    with labelled_kernels():
        model = spread(stock()[0], devices)
        found, held = feed(model, CHUNKS, captured=captured)
        assert len(set(layer_devices(model))) == devices
        assert [layer.device for layer in packed_layers(held)] == layer_devices(model)
    for one, other in zip(found, expected(), strict=True):
        assert torch.equal(one, other)


def test_a_page_is_packed_where_its_tokens_lie() -> None:
    _, sidecar = stock()
    keys, values = torch.randn(2, 1, PAGE_TOKENS, 16, generator=torch.Generator().manual_seed(0))
    codec = unrotated_codecs(sidecar)[0]
    expected = codec.encode(keys, values)
    with labelled_kernels():
        there = torch.device("cuda:1")
        found = codec.to(there).encode(keys.to(there), values.to(there), impl="triton")
        for ours, theirs in zip(found, expected, strict=True):
            for field in fields(ours):
                one, other = getattr(ours, field.name), getattr(theirs, field.name)
                assert one.device == there
                # Positions are for who stores the page.
                if field.name != "base_positions":
                    assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))


def rotate_on_the_host(kernels: LayerKernels, query: Tensor, *given: Any) -> Tensor:
    return rotate(kernels, query, given[0].cpu(), *given[1:])


def decode_with_tables_of(query: Tensor, rows: Any, tables: Any, *given: Any, **how: Any) -> Tensor:
    """Those of the first layer for all."""
    return decode(query, rows, _first.setdefault("tables", tables), *given, **how)


rotate = LayerKernels.rotate
_first: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("name", "broken", "error", "message"),
    [
        ("kvq_runtime.layer_kernels.LayerKernels.rotate", rotate_on_the_host, ValueError, "cpu"),
        ("kvq_kernels.decode.decode", decode_with_tables_of, RuntimeError, "cuda:0.*on cuda:1"),
        ("kvq_kernels.rotate_queries.current", lambda _: nullcontext(), RuntimeError, "cuda:1.*0"),
    ],
)
def test_what_lies_elsewhere_is_found(
    name: str, broken: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, broken)
    _first.clear()
    with labelled_kernels(), pytest.raises(error, match=message):
        feed(spread(stock()[0], 2), [1])


def test_a_step_is_captured_on_one_device() -> None:
    model, sidecar = stock()
    with labelled_devices(), torch.no_grad():
        scattered = spread(model, 2)
        held = PackedCache(scattered, sidecar, capacity=CAPACITY)
        with (
            attach(scattered, sidecar, impl="triton"),
            pytest.raises(KVQError, match=r"several devices \(cuda:0, cuda:1\)"),
        ):
            CapturedDecode(scattered, held)
