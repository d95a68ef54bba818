"""Tokens that are kept: evenly, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_calibration.token_sample import TokenSample


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    at_most=st.integers(1, 40),
)
def test_every_so_many_tokens_of_all_batches(sizes: list[int], at_most: int) -> None:
    total = sum(sizes)
    numbers = torch.arange(total * 6).reshape(total, 2, 3).float()
    sample = TokenSample.of(total, at_most=at_most, dtype=torch.float32)
    for batch in numbers.split(sizes):
        sample.add(batch, -batch)
    expected = numbers[:: sample.stride]
    assert torch.equal(sample.numbers, expected)
    assert torch.equal(sample.energy, expected.square().sum(-1))
    assert len(expected) <= at_most
    # No more are left out than have to be.
    assert sample.stride == 1 or total / (sample.stride - 1) > at_most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_are_kept_in_the_models_type(dtype: torch.dtype) -> None:
    numbers = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    sample = TokenSample.of(5, at_most=5, dtype=dtype)
    sample.add(numbers, numbers)
    assert sample._kept[0][0].dtype == dtype
    assert torch.equal(sample.numbers, numbers)


def test_a_batch_is_not_kept_for_a_few_of_its_tokens() -> None:
    batch = torch.randn(100, 1, 4)
    sample = TokenSample.of(100, at_most=10, dtype=torch.float32)
    sample.add(batch, batch)
    assert sample._kept[0][0].untyped_storage().nbytes() == 10 * 4 * 4
