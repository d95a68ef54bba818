"""Decode kernels, and their reference, against attention by the book in f64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from decode_checks import check, exact_bound, expected_error, run
from dense_attention import dense_row
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import KVQError
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.decode_buffers import scratch_bytes
from kvq_kernels.kernel_tables import check_layer
from kvq_kernels.packed_rows import table_entry
from kvq_kernels.rotary import RotaryAngles
from packed_cases import PackedCase, cut_last_pages, make_case
from poisoned import PoisonedWorkspace


@pytest.mark.parametrize(
    "how",
    [
        {"key_bits": 2, "value_bits": 2},
        {"key_bits": 3, "value_bits": 3, "G": 8},
        {"key_bits": 4, "value_bits": 4, "G": 1, "H": 2},
        {"key_bits": 2, "value_bits": 3, "G": 3},
        {"key_bits": 4, "value_bits": 2, "G": 7, "value_grain": "head", "H": 2},
        {"key_bits": 3, "value_bits": 4, "G": 16, "outlier_fraction": 0.0},
        {"key_bits": 2, "value_bits": 2, "outlier_fraction": 0.0, "D": 80, "rotary_dim": 20},
        {"key_bits": 4, "value_bits": 4, "outlier_fraction": 0.0, "D": 96, "G": 5},
        {"key_bits": 3, "value_bits": 3, "D": 128, "tokens": (300,)},
        {"key_bits": 3, "value_bits": 3, "D": 256, "tokens": (300,), "G": 2},
        {"key_bits": 4, "value_bits": 3, "D": 80, "tokens": (530,)},
        {"key_bits": 3, "value_bits": 2, "D": 64, "rotary_dim": 16, "G": 2},
        {"key_bits": 2, "value_bits": 4, "D": 16, "H": 3, "tokens": (1000, 300)},
        {"key_bits": 3, "value_bits": 3, "D": 32, "rotary_scaling": 2.0},
    ],
)
def test_shapes_and_widths(how: dict[str, Any], device: torch.device) -> None:
    check(make_case(**how), device)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ragged_rows(bits: int, device: torch.device) -> None:
    """No token, one, and one more or less than fills sinks, tail or a page."""
    tokens = (0, 1, 2, 255, 256, 257, 258, 513, 1000)
    check(make_case(tokens=tokens, key_bits=bits, value_bits=bits, D=16, G=2), device)


@pytest.mark.parametrize(
    ("spread", "config"),
    [
        (0.9, {}),  # no key is an outlier
        (1.1, {}),  # 9 % are: pools overflow
        (1.02, {"outlier_capacity": 0.05}),  # 2 %: pools have room
        (1.5, {"outlier_fraction": 0.2}),  # and lists of values with many entries
    ],
)
def test_pools_empty_filled_and_overflowing(
    spread: float, config: dict[str, Any], device: torch.device
) -> None:
    case = make_case(spread=spread, D=32, H=2, G=2, **config)
    used = case.rows.key_pages.outlier_counts.sum(-1)
    capacity = case.rows.key_pages.outliers.shape[-1]
    assert bool((used == 0).all()) == (spread < 1)
    assert bool((used == capacity).all()) == (spread > 1.05)
    check(case, device)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_learned_sinks(
    softcap: float | None, with_sinks: bool, device: torch.device
) -> None:
    case = make_case(tokens=(400, 0, 20), D=32, G=3)
    logits = torch.tensor([0.5, -2.0, 4.0], device=device) if with_sinks else None
    check(case, device, AttentionOptions(case.scaling, softcap=softcap, sink_logits=logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    check(make_case(D=32, dtype=dtype, exact_dtype=dtype), device)


@pytest.mark.parametrize("length", [1, 17, 64, 65, 255])
def test_pages_that_were_cut(length: int, device: torch.device) -> None:
    check(cut_last_pages(make_case(tokens=(600, 300), D=16, G=2), length), device)


def test_pages_whose_positions_jump(device: torch.device) -> None:
    case = make_case(tokens=(900,), D=32, G=2, rotary_scaling=2.0)
    base = case.rows.key_pages.base_positions
    base[case.rows.block_table[0, 1] & 0xFF] = -2
    jumps = torch.arange(2 * PAGE_TOKENS, dtype=torch.int32).view(2, PAGE_TOKENS) * 3 + 11
    check(replace(case, rows=replace(case.rows, irregular_positions=jumps)), device)


def test_rows_share_pages(device: torch.device) -> None:
    case = make_case(tokens=(600, 600), D=16, G=2)
    case.rows.block_table[1] = case.rows.block_table[0]
    check(case, device)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_any_number_of_splits_gives_the_same(splits: int, device: torch.device) -> None:
    case = make_case(tokens=(1100, 300), D=16, G=2)
    options = AttentionOptions(scaling=case.scaling)
    one = run(case, options, device, splits=1)
    many = run(case, options, device, splits=splits)
    for row in range(2):
        # A weight is rounded relative to the largest score that its split has met.
        bound = exact_bound(case, row, dense_row(case, row, options), options)
        assert ((one[row] - many[row]).abs() <= 2 * bound).all()


def test_more_room_in_the_table_changes_nothing(device: torch.device) -> None:
    case = make_case(tokens=(600,), D=16, G=2)
    options = AttentionOptions(scaling=case.scaling)
    wide = torch.nn.functional.pad(case.rows.block_table, (0, 5), value=table_entry(10**6, 1))
    roomy = replace(case, rows=replace(case.rows, block_table=wide))
    assert torch.equal(run(case, options, device, splits=2), run(roomy, options, device, splits=2))
    assert torch.equal(
        run(case, options, device, splits=2), run(roomy, options, device, splits=2, max_pages=2)
    )


@pytest.mark.parametrize(
    ("bits", "how"),
    [
        (2, {}),
        (3, {"first_position": 2**20 - 400}),
        (4, {"first_position": 2**20 - 400}),
        (4, {"rotary_scaling": 1.25}),
        (3, {"rotary_dim": 20, "outlier_fraction": 0.05}),
    ],
)
def test_any_numbers_at_any_position(bits: int, how: dict[str, Any], device: torch.device) -> None:
    """Against f64: the root mean square of what differs is what roundings to 16 bits explain."""
    case = make_case(tokens=(800,), key_bits=bits, value_bits=bits, exact=False, **how)
    options = AttentionOptions(scaling=case.scaling)
    found = run(case, options, device)[0]
    dense = dense_row(case, 0, options)
    expected = expected_error(case, dense, options)
    error = (found - dense.output).square().mean().sqrt()
    assert error <= 1.5 * expected
    # What it is worth: a wrong position of one page in three would be seen.
    assert dense.output.square().mean().sqrt() > 20 * expected


@pytest.mark.parametrize("outlier_fraction", [0.0, 0.01])
def test_what_is_held_is_counted(outlier_fraction: float, device: torch.device) -> None:
    case = make_case(tokens=(600, 300), D=16, H=2, G=3, outlier_fraction=outlier_fraction)
    workspace = PoisonedWorkspace()
    options = AttentionOptions(scaling=1.0)
    output = run(case, options, device, workspace=workspace)
    counted = scratch_bytes(
        case.config,
        batch=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        max_pages=case.rows.block_table.shape[1],
        exact_room=case.rows.exact_keys.shape[2],
        device=device,
    )
    assert counted == workspace.nbytes + 4 * output.numel()


def refused(case: PackedCase, words: str, *, group_size: int = 2) -> None:
    with pytest.raises(KVQError, match=words) as caught:
        check_layer(case.parameters, case.angles, group_size=group_size)
    assert "--impl reference" in str(caught.value.hint)


def test_what_kernels_do_not_take() -> None:
    plain = make_case(tokens=(10,), D=16)
    check_layer(plain.parameters, plain.angles, group_size=16)
    refused(plain, "17 query heads share", group_size=17)
    refused(make_case(tokens=(10,), D=16, rotary_dim=6), "rotates 6 of 16 channels")
    refused(make_case(tokens=(10,), D=512), "head_dim is 512")
    far = replace(plain.parameters.key, center=plain.parameters.key.center + 5e4)
    case = replace(plain, parameters=replace(plain.parameters, key=far))
    refused(case, r"keys of this model reach 7\.\d+e\+04")
    near = replace(plain.parameters.key, center=plain.parameters.key.center + 4e4)
    case = replace(plain, parameters=replace(plain.parameters, key=near))
    check_layer(case.parameters, case.angles, group_size=1)
    refused(replace(case, angles=RotaryAngles(case.angles.frequencies, 1.5)), "reach 8")
