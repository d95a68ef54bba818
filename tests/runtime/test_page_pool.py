from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from exact_pages import ExactPageCodec
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.parameters import KeyParameters, LayerParameters, ValueParameters
from kvq_runtime.page_codec import SidecarPageCodec
from kvq_runtime.page_pool import SMALLEST_SLAB, PagePool

H, D = 2, 16


@pytest.fixture
def pool() -> PagePool:
    unrotated: Any = None
    return PagePool(ExactPageCodec(unrotated, H, D), device="cpu")


def numbers(pages: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(H, pages * 256, D, generator=generator) for _ in range(2))
    return keys, values, torch.arange(7, 7 + pages * 256, dtype=torch.int32)


def stored(pool: PagePool, pages: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    parts = list(pool.read(pages))
    keys = torch.cat([pool.codec.decode_keys(key) for key, _ in parts])
    values = torch.cat([pool.codec.decode_values(value)[0] for _, value in parts])
    base = torch.cat([key.base_positions for key, _ in parts])
    return keys.transpose(0, 1).flatten(1, 2), values.mT.transpose(0, 1).flatten(1, 2), base


def test_pages_come_back_as_they_were_written_across_slabs(pool: PagePool) -> None:
    pages = pool.take(SMALLEST_SLAB) + pool.take(3)
    assert len(pool.slabs) == 2
    keys, values, positions = numbers(len(pages))
    pool.write(pages, keys, values, positions, regular=[True] * len(pages))
    found = stored(pool, pages)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    assert found[2].tolist() == [7 + 256 * place for place in range(len(pages))]
    # In another order, with gaps, over the border of the slabs.
    some = [9, 2, 3, 8, 0]
    found = stored(pool, some)
    paged = keys.reshape(H, -1, 256, D)
    assert torch.equal(found[0].reshape(H, -1, 256, D), paged[:, some])


def test_pages_side_by_side_are_read_without_a_copy(pool: PagePool) -> None:
    pool.take(5)
    ((key, _),) = pool.read([1, 2, 3])
    assert key.numbers.data_ptr() == pool.slabs[0].key.numbers[1].data_ptr()


def test_slabs_never_move(pool: PagePool) -> None:
    pool.take(SMALLEST_SLAB)
    before = pool.slabs[0].key.numbers.data_ptr()
    for _ in range(40):
        pool.take(1)
    assert pool.slabs[0].key.numbers.data_ptr() == before
    assert len(pool.slabs) < 8
    assert pool.num_pages <= 1.5 * 48 + SMALLEST_SLAB


def test_what_is_released_is_taken_again(pool: PagePool) -> None:
    pages = pool.take(6)
    pool.share(pages[:3])
    pool.release(pages)
    assert pool.used_pages == 3
    allocated = pool.allocated_bytes
    assert set(pool.take(3)) == set(pages[3:])
    pool.release(pages[:3])
    assert pool.take(1) == [pages[0]]
    assert pool.allocated_bytes == allocated


def test_reserved_pages_are_allocated_at_once(pool: PagePool) -> None:
    pool.reserve(100)
    pool.reserve(50)
    assert (pool.num_pages, len(pool.slabs)) == (100, 1)
    assert pool.allocated_bytes == 100 * pool.page_bytes
    assert pool.page_bytes == 2 * 4 * H * 256 * D + 4


def test_positions_that_jump_are_kept_beside_the_page(pool: PagePool) -> None:
    pages = pool.take(2)
    keys, values, positions = numbers(2)
    positions[300:] += 11
    before = pool.allocated_bytes
    pool.write(pages, keys, values, positions, regular=[True, False])
    assert stored(pool, pages)[2].tolist() == [7, -1]
    assert torch.equal(pool.positions_of(pages[1]), positions[256:])
    assert pool.allocated_bytes == before + 4 * 256
    pool.release([pages[1]])
    assert not pool.irregular


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 4), (3, 3)])
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.01])
def test_pages_of_a_sidecar(key_bits: int, value_bits: int, outlier_fraction: float) -> None:
    """Every dtype of a real page survives writes that are scattered over slabs."""
    config = KVQConfig.create(
        key_bits=key_bits, value_bits=value_bits, outlier_fraction=outlier_fraction
    )
    key_book, value_book = (
        Codebook.fit_grid(torch.linspace(-1, 1, 1 << bits)) for bits in (key_bits, value_bits)
    )
    parameters = LayerParameters(
        KeyParameters(torch.zeros(H, D), torch.full((H, D), 2.0), key_book, 1 / 16),
        ValueParameters(value_book, 1 / 32),
    )
    pool = PagePool(SidecarPageCodec(parameters, config, None), device="cpu")
    taken = pool.take(SMALLEST_SLAB + 2)
    pages = [taken[place] for place in (9, 1, 7, 8)]
    keys, values, positions = numbers(4, seed=3)
    pool.write(pages, keys, values, positions, regular=[True] * 4)
    whole_key, whole_value = pool.codec.encode(keys, values)
    for place, page in enumerate(pages):
        ((key, value),) = pool.read([page])
        for found, written in ((key, whole_key), (value, whole_value)):
            for name, tensor in vars(found).items():
                if name != "base_positions":
                    assert torch.equal(tensor[0], getattr(written, name)[place]), name


def test_a_pool_with_a_capacity_grows_by_what_it_must(pool: PagePool) -> None:
    """Cropping into pages leaves cut ones behind, so that a full row may need one more."""
    reserved = PagePool(pool.codec, device="cpu", has_capacity=True)
    reserved.reserve(40)
    reserved.take(41)
    assert reserved.num_pages == 41
    key, _ = reserved.whole()
    assert (len(reserved.slabs), len(key.base_positions)) == (1, 41)
