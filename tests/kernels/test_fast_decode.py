"""The fast path of decoding, compiled: on a GPU, or on a machine that runs PTX (``conftest``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_checks import check, exact_bound, expected_error, run
from dense_attention import dense_row
from kvq_kernels import decode
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.launch_table import DecodeLaunch
from kvq_kernels.packed_rows import PAGE_ID_MASK, table_entry
from packed_cases import PackedCase, cut_last_pages, make_case

pytestmark = pytest.mark.skipif(
    os.environ.get("KVQ_TEST_DEVICE", "cpu") == "cpu",
    reason="Gluon cannot be interpreted: test_compiled.py runs this file",
)


PORTABLE = DecodeLaunch("portable", 4, 2)


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Main kernels that a test has run; fails a test that nothing fast has served."""
    served: list[str] = []
    before = decode.decode_launch

    def decode_launch(architecture: str, **layer: Any) -> DecodeLaunch:
        found = before(architecture, **layer)
        served.append(found.path)
        return found

    monkeypatch.setattr(decode, "decode_launch", decode_launch)
    yield served
    assert "registers" in served


@pytest.mark.parametrize("G", [1, 3, 4, 8])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (2, 4), (4, 3)])
def test_widths_and_groups(bits: tuple[int, int], G: int, device: torch.device) -> None:
    D = 128 if G in (3, 4) else 64
    check(make_case(key_bits=bits[0], value_bits=bits[1], G=G, D=D, tokens=(530,)), device)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ragged_rows(bits: int, device: torch.device) -> None:
    tokens = (0, 1, 257, 258, 513, 1000, 1400)
    check(make_case(tokens=tokens, key_bits=bits, value_bits=bits, G=2), device)


@pytest.mark.parametrize(
    "how",
    [
        {"outlier_fraction": 0.0},
        {"outlier_fraction": 0.1, "G": 8},
        {"value_grain": "head", "H": 2},
        {"rotary_scaling": 2.0},
        {"dtype": torch.bfloat16},
        {"D": 256, "G": 2, "H": 2},
        {"D": 256, "key_bits": 2, "value_bits": 4},
    ],
)
def test_caches(how: dict[str, Any], device: torch.device) -> None:
    check(make_case(tokens=(600,), **how), device)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 4.0}, {"sink_logits": torch.tensor([0.5, -3.0, 2.0, 0.0])}],
)
def test_scores_that_are_changed(options: dict[str, Any], device: torch.device) -> None:
    case = make_case(tokens=(600,))
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    check(case, device, AttentionOptions(scaling=case.scaling, **given))


@pytest.mark.parametrize("length", [1, 17, 255])
def test_pages_that_were_cut(length: int, device: torch.device) -> None:
    check(cut_last_pages(make_case(tokens=(600, 300), G=2), length), device)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_both_paths_and_any_number_of_splits(
    splits: int, monkeypatch: pytest.MonkeyPatch, device: torch.device, paths: list[str]
) -> None:
    case = make_case(tokens=(1100, 300), G=4, D=128)
    options = AttentionOptions(scaling=case.scaling)
    fast = run(case, options, device, splits=splits)
    monkeypatch.setattr(decode, "decode_launch", lambda *_, **__: PORTABLE)
    portable = run(case, options, device, splits=1)
    for row in range(2):
        bound = exact_bound(case, row, dense_row(case, row, options), options)
        assert ((fast[row] - portable[row]).abs() <= 2 * bound).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_any_numbers_near_a_million(bits: int, device: torch.device) -> None:
    """As in ``test_decode``: what differs from f64 is what roundings to 16 bits explain."""
    how = {"first_position": 2**20 - 400, "exact": False, "D": 128}
    case = make_case(tokens=(800,), key_bits=bits, value_bits=bits, **how)
    options = AttentionOptions(scaling=case.scaling)
    found = run(case, options, device, splits=1)[0]
    dense = dense_row(case, 0, options)
    expected = expected_error(case, dense, options)
    error = (found - dense.output).square().mean().sqrt()
    assert error <= 1.5 * expected
    assert dense.output.square().mean().sqrt() > 20 * expected


def tight(case: PackedCase) -> PackedCase:
    """With a block table that ends where the longest row does."""
    pages = int(case.rows.lengths[:, 0].max())
    table = case.rows.block_table[:, :pages].contiguous()
    return replace(case, rows=replace(case.rows, block_table=table))


@pytest.mark.parametrize("G", [1, 4, 8])
def test_nothing_behind_the_last_page(G: int, device: torch.device) -> None:
    check(tight(make_case(tokens=(1100, 300, 900), H=2, G=G)), device)


def test_a_single_page(device: torch.device) -> None:
    check(tight(make_case(tokens=(400, 300, 40), H=3, G=2, D=128)), device)


def test_more_room_in_the_table_changes_nothing(device: torch.device) -> None:
    case = make_case(tokens=(1100, 300), H=2, G=4)
    options = AttentionOptions(scaling=case.scaling)
    wide = torch.nn.functional.pad(case.rows.block_table, (0, 5), value=table_entry(10**6, 1))
    roomy = replace(case, rows=replace(case.rows, block_table=wide))
    found = run(case, options, device, splits=2)
    assert torch.equal(found, run(roomy, options, device, splits=2))
    assert torch.equal(found, run(roomy, options, device, splits=2, max_pages=4))


def test_what_lies_behind_the_outliers(device: torch.device) -> None:
    """Pools and lists are read to their end; what is behind the last entry adds nothing."""
    case = make_case(tokens=(1100, 300, 0), H=2, D=128, spread=1.005)
    keys, values = case.rows.key_pages, case.rows.value_pages

    def filled(entries: Tensor, used: Tensor) -> Tensor:
        behind = torch.arange(entries.shape[-1]) >= used[..., None]
        assert behind.any()
        return torch.where(behind, torch.full_like(entries, 0x7ABC), entries)

    pools = filled(keys.outliers, keys.outlier_counts.long().sum(-1))
    lists = filled(values.outliers, values.outlier_offsets.long()[..., -1])
    rows = replace(
        case.rows,
        key_pages=replace(keys, outliers=pools),
        value_pages=replace(values, outliers=lists),
    )
    check(replace(case, rows=rows), device)


def test_half_ranges_that_fall_and_rise(device: torch.device) -> None:
    """Sums of values are kept in units of the last page's widest half-range."""
    case = make_case(tokens=(1600,))
    scales = case.rows.value_pages.scales.clone()
    for index, factor in enumerate((100.0, 0.001, 30.0, 0.01, 1.0)):
        scales[int(case.rows.block_table[0, index]) & PAGE_ID_MASK] *= factor
    rows = replace(case.rows, value_pages=replace(case.rows.value_pages, scales=scales))
    case = replace(case, rows=rows)
    options = AttentionOptions(scaling=case.scaling)
    found = run(case, options, device, splits=1)
    dense = dense_row(case, 0, options)
    assert ((found[0] - dense.output).abs() <= exact_bound(case, 0, dense, options)).all()
