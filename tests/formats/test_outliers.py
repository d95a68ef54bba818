"""The choice of outliers against a sort, and entries against their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_formats import outliers
from kvq_formats.config import KVQConfig


@settings(max_examples=60, deadline=None)
@given(
    entries=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    levels=st.integers(1, 12),
    room=st.integers(1, 70),
    seed=st.integers(0, 10_000),
)
def test_the_largest_are_kept_first_come_first(
    entries: int, share: float, levels: int, room: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(0, levels, (2, 3, entries), generator=generator).float()
    candidates = torch.rand(2, 3, entries, generator=generator) < share
    rooms = torch.tensor([room, max(1, room // 2)])
    kept = outliers.keep_largest(magnitude, candidates, rooms)
    for page in range(2):
        for head in range(3):
            places = candidates[page, head].nonzero()[:, 0].tolist()
            ranked = sorted(places, key=lambda i: (-float(magnitude[page, head, i]), i))
            expected = sorted(ranked[: int(rooms[page])])
            assert kept[page, head].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
def test_entries_hold_sign_and_index(bits: int) -> None:
    low, high = outliers.residual_limits(bits)
    assert high - low + 1 == 1 << (16 - bits)
    steps = torch.tensor([low, -1, 0, 1, high], dtype=torch.int32)
    index = torch.tensor([0, 1, (1 << bits) - 1, 3, 2], dtype=torch.int32)
    kept = torch.ones(1, 1, 5, dtype=torch.bool)
    pools = outliers.pack_entries(kept, steps[None, None], index, bits=bits, capacity=8)
    found = outliers.unpack_entries(pools, bits=bits)
    assert found[0][0, 0, :5].tolist() == steps.tolist()
    assert found[1][0, 0, :5].tolist() == index.tolist()
    assert (pools[0, 0, 5:] == 0).all()


def test_residuals_saturate() -> None:
    low, high = outliers.residual_limits(8)
    steps = outliers.quantize_residuals(
        torch.tensor([-1e30, -0.26, 0.24, 1e30, torch.inf]), step=0.5, index_bits=8
    )
    assert steps.tolist() == [low, -1, 0, high, high]


@pytest.mark.parametrize(("head_dim", "bits"), [(16, 4), (64, 6), (80, 7), (128, 7), (256, 8)])
def test_a_channel_needs_as_many_bits(head_dim: int, bits: int) -> None:
    assert outliers.channel_bits(head_dim) == bits


def test_room_is_aligned_to_sixteen_bytes() -> None:
    config = KVQConfig()
    for head_dim in (64, 80, 128):
        assert outliers.key_pool_capacity(config, head_dim) % outliers.ALIGNMENT == 0
        assert outliers.key_pool_capacity(config, head_dim) >= 0.01 * 256 * head_dim
    # 1 % of 8 heads of 128: five entries at each end of a token, a quarter more room.
    assert outliers.value_outliers_per_side(config, 8, 128) == 5
    assert outliers.value_list_capacity(config, 8, 128) == 400
    assert outliers.value_outliers_per_side(config, 2, 64) == 1
    assert outliers.value_list_capacity(config, 2, 64) == 320
