from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime.forward import Forward, check_positions, spans
from kvq_runtime.rotary_channels import UNROTATED


@given(st.lists(st.booleans(), max_size=30))
def test_spans_cover_what_is_true(flags: list[bool]) -> None:
    covered = [False] * len(flags)
    found = spans(torch.tensor(flags, dtype=torch.bool))
    for start, stop in found:
        covered[start:stop] = [True] * (stop - start)
    assert covered == flags
    assert all(stop < after for (_, stop), (after, _) in pairwise(found))


@pytest.mark.parametrize("positions", [[-1, 0], [0, 2**31]])
def test_positions_that_no_cache_can_hold(positions: list[int]) -> None:
    with pytest.raises(KVQError, match="expected 0 to"):
        check_positions(torch.tensor([positions]), None)


def test_positions_that_go_back() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(KVQError, match="packed sequences"):
        check_positions(positions, None)
    # Over padding they may: it is not stored.
    check_positions(positions, torch.tensor([[True, True, False, True, True]]).logical_not())
    check_positions(torch.tensor([[3, 3, 9, 2**31 - 1]]), None)
    check_positions(torch.zeros(2, 0, dtype=torch.int64), None)


def test_a_key_that_is_not_the_one_that_was_expected() -> None:
    forward = Forward.consecutive(0, 1, 2, device=torch.device("cpu"))
    key, whole = torch.zeros(1, 2, 2, 4), (0, 4)
    with pytest.raises(UnsupportedModelError, match="without having rotated"):
        forward.check_key(key, whole)
    forward.check_key(forward.expect_key(key), whole)
    with pytest.raises(UnsupportedModelError, match="without having rotated"):
        forward.check_key(key, whole)
    forward.expect_key(key)
    with pytest.raises(UnsupportedModelError, match="between RoPE and the cache"):
        forward.check_key(key * 2, whole)


def test_a_part_of_a_key_and_none_of_it() -> None:
    forward = Forward.consecutive(0, 1, 2, device=torch.device("cpu"))
    key = torch.zeros(1, 2, 2, 4)
    forward.expect_key(key[..., 1:3])
    forward.check_key(key, (1, 3))
    forward.check_key(key, UNROTATED)
    forward.expect_key(key)
    with pytest.raises(UnsupportedModelError, match=r"rotates 4 channels .* says 2"):
        forward.check_key(key, (1, 3))
    forward.expect_key(key)
    with pytest.raises(UnsupportedModelError, match=r"rotates 4 channels .* says 0"):
        forward.check_key(key, UNROTATED)


def test_layers_elsewhere_get_their_own_tensors() -> None:
    """Weights may be spread over devices; the meta device stands for another one."""
    here, there = torch.device("cpu"), torch.device("meta")
    attended = torch.tensor([1, 2])
    forward = Forward([None, attended], [[(0, 3)], [(1, 3)]], torch.zeros(2, 3, dtype=torch.int32))
    assert forward.on(here) is forward
    moved = forward.on(there)
    assert moved is forward.on(there)
    assert moved.positions.device == there
    assert moved.attended[0] is None
    assert moved.attended[1] is not None
    assert moved.attended[1].device == there
    assert moved.runs == forward.runs
