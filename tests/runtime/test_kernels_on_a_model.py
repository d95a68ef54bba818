"""A model on Triton kernels against the same model on the reference.

In Triton's interpreter, or with ``KVQ_TEST_DEVICE=cuda`` on a GPU, where the table is longer.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES
from kvq_runtime import layer_attention
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache
from kvq_runtime.memory import plan_memory
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

DEVICE = torch.device(os.environ.get("KVQ_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
U16 = 2.0**-11
PADDING, PROMPT = 20, 290


def logits(impl: str, *, title: str, rule: Any, steps: int, **options: Any) -> list[Tensor]:
    """Of a padded prompt in two chunks, and of ``steps`` single tokens after it."""
    family = FAMILIES[title]
    model = family.make().to(DEVICE)
    sidecar = replace(
        make_sidecar(3, model=model, **options), rotary_channels=family.rotary_channels
    )
    generator = torch.Generator().manual_seed(0)
    rows = 2 if ON_GPU else 1
    total = PROMPT + 8 + steps
    ids = torch.randint(3, 199, (rows, total), generator=generator).to(DEVICE)
    mask = torch.ones(rows, total, dtype=torch.int64, device=DEVICE)
    mask[0, :PADDING] = 0
    found, at = [], 0
    cache = PackedCache(model, sidecar)
    with torch.inference_mode(), attach(model, sidecar, rule=rule, impl=impl):  # type: ignore[arg-type]
        for T in (PROMPT, 8, *([1] * steps)):
            out = model(
                ids[:, at : at + T], attention_mask=mask[:, : at + T], past_key_values=cache
            )
            found.append(out.logits[:, PADDING if at == 0 else 0 :].cpu().double())
            at += T
    assert all(row.pages for packed in cache.layers for row in packed.rows)
    return found


# Layers without RoPE, and keys of which a part is cut out to be rotated, interleaved, and not. The
# interpreter is slow: there one model, of which one layer rotates its keys and one does not.
TITLES = ["Llama 3.x", "SmolLM3", "StableLM", "GLM-4"]
MIXED = {"layer_bits": {0: (2, 4), 1: (4, 3)}}


@pytest.mark.parametrize(
    ("title", "rule", "options"),
    [
        *((title, "runtime", {}) for title in TITLES),
        ("Llama 3.x", "exact-prefill", {"recent_tokens": 5}),
        ("Llama 3.x", "runtime", MIXED),
    ]
    if ON_GPU
    else [(title, "runtime", {"recent_tokens": 5, **MIXED}) for title in TITLES[1:2]],
)
def test_logits_match_the_reference(
    title: str, rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closer than two runs of the reference of which one rounds attention to 16 bits.

    What kernels round is weights, keys and queries, each by up to U16 of itself: on average an
    output moves by much less than U16 of the largest value, which is how far it is moved here.
    """
    steps = 20 if ON_GPU else 2
    reference = logits("reference", title=title, rule=rule, steps=steps, **options)
    kernels = logits("triton", title=title, rule=rule, steps=steps, **options)
    exactly = layer_attention.attend
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def rounded(query: Tensor, **how: Any) -> Tensor:
        output = exactly(query, **how)
        noise = torch.rand(output.shape, generator=generator, device=output.device) * 2 - 1
        return output + noise * U16 * how["exact"].values.abs().max()

    monkeypatch.setattr(layer_attention, "attend", rounded)
    moved = logits("reference", title=title, rule=rule, steps=steps, **options)
    for expected, found, other in zip(reference, kernels, moved, strict=True):
        assert (found - expected).abs().max() <= (other - expected).abs().max()
        # A model that reads something else differs by as much as its logits are large.
        assert (other - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_cache_that_grows_stays_readable() -> None:
    """Slabs become one piece when kernels read them, and go on growing."""
    model = make_tiny_llama().to(DEVICE)
    packed = PackedCache(model, make_sidecar(2)).layers[0]
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 256 * 10, 16)
    keys, values = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    packed.append(keys, values)
    packed.append(keys, values)
    assert len(packed.pool.slabs) > 1
    before = [
        torch.cat(parts)
        for parts in zip(
            *(vars(key).values() for key, _ in packed.pool.read(packed.rows[0].pages)), strict=True
        )
    ]
    key, _ = packed.pool.whole()
    assert len(packed.pool.slabs) == 1
    for kept, field in zip(before, vars(key).values(), strict=True):
        assert torch.equal(kept, field[packed.rows[0].pages])
    packed.append(keys, values)
    assert len(packed.rows[0].pages) == 29


@pytest.mark.skipif(
    not ON_GPU, reason="the interpreter copies what kernels read; no allocator to ask"
)
def test_a_plan_holds_on_a_gpu() -> None:
    model = make_tiny_llama(
        hidden_size=256, num_attention_heads=16, num_key_value_heads=4, head_dim=64
    ).to(DEVICE, torch.bfloat16)
    sidecar = make_sidecar(3, model=model)
    plan = plan_memory(model, sidecar, context=8192, prefill_chunk=1024)
    ids = torch.randint(3, 300, (1, 8192), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode(), attach(model, sidecar):
        cache = PackedCache(model, sidecar, capacity=8192)
        for start in range(0, 8192 - 1024, 1024):
            model(ids[:, start : start + 1024], past_key_values=cache, logits_to_keep=1)
        model(ids[:, -1024:-1023], past_key_values=cache, logits_to_keep=1)
        model(ids[:, -1023:], past_key_values=cache, logits_to_keep=1)
    found = torch.cuda.max_memory_allocated() - before
    assert found <= plan.cache + plan.scratch <= 1.25 * found
