"""What is alive after a forward is what the cache reports, and no copy in any other form."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from kvq_kernels import attention
from kvq_runtime.attach import AttachRule, attach
from kvq_runtime.cache import PackedCache
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

FORWARD_BYTES = 64
"""Of a token of the last forward: its position, a few times. Its numbers are 1,024 here in f32."""


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    # isinstance() would wake lazy objects of other libraries.
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    # Views share a storage, which counts once.
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def feed(sizes: list[int]) -> list[Tensor]:
    ids = torch.randint(3, 300, (1, sum(sizes)), generator=torch.Generator().manual_seed(0))
    return list(ids.split(sizes, dim=1))


def beyond_the_cache(rule: AttachRule, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that are alive after a text was fed, without those that the cache reports."""
    model = make_tiny_llama(num_hidden_layers=4, max_position_embeddings=4096)
    sidecar = make_sidecar(2, model=model)
    # Pages are decoded one by one, so that the workspace has the same size for few and many.
    monkeypatch.setattr(attention, "DECODED_BLOCK_BYTES", 1)
    before = live_bytes()
    with attach(model, sidecar, rule=rule):
        cache = PackedCache(model, sidecar, capacity=sum(sizes))
        for piece in feed(sizes):
            model(piece, past_key_values=cache, logits_to_keep=1)
        # The text itself.
        del piece
        assert cache.tokens_held == [sum(sizes)]
        return live_bytes() - before - cache.allocated_bytes


@pytest.mark.parametrize(
    ("rule", "few", "many"),
    [
        ("runtime", [600], [1600]),
        ("runtime", [512, 88], [512, 512, 512, 64]),
        ("runtime", [600, 1], [1500, *[1] * 100]),
        ("exact-prefill", [600], [1600]),
        ("exact-prefill", [600, 1], [1600, 1]),
    ],
)
@torch.no_grad()
def test_the_cache_is_all_that_grows(
    rule: AttachRule, few: list[int], many: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = beyond_the_cache(rule, many, monkeypatch) - beyond_the_cache(rule, few, monkeypatch)
    assert grown <= FORWARD_BYTES * max(0, many[-1] - few[-1])


@torch.no_grad()
def test_a_cache_that_is_dropped_is_gone() -> None:
    model = make_tiny_llama()
    with attach(model, make_sidecar()):
        cache = model(feed([300])[0]).past_key_values
        known = weakref.ref(cache)
        del cache
        gc.collect()
        assert known() is None
