"""Decode kernels held to attention by the book in f64, with a bound that follows from roundings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dense_attention import U16, U32, DenseRow, dense_row, score_errors
from kvq_kernels import decode_reference
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.decode import decode
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.phases import Phases
from packed_cases import PackedCase, on_device
from poisoned import PoisonedWorkspace, empty_is_nan

SIGMAS = 6


def run(case: PackedCase, options: AttentionOptions, device: torch.device, **how: Any) -> Tensor:
    given = {"workspace": PoisonedWorkspace(), **how}
    query, rows = case.query.to(device), on_device(case.rows, device)
    tables = KernelTables.of(case.parameters, case.config, device=device)
    phases = Phases.of(case.angles, device=device)
    with empty_is_nan():
        found = decode(query, rows, tables, phases, options=options, **given)
    assert found.dtype == torch.float32
    return found.cpu().double()


def run_reference(case: PackedCase, options: AttentionOptions) -> Tensor:
    tables = KernelTables.of(case.parameters, case.config, device="cpu")
    return decode_reference.decode(
        case.query.double(), case.rows, tables, case.angles, options=options
    )


def exact_bound(case: PackedCase, row: int, dense: DenseRow, options: AttentionOptions) -> Tensor:
    """Largest difference ``[HQ, D]`` where scores are exact but for those of outliers.

    What is left: weights are rounded to f16, each by up to U16 of itself, or by 2**-25 of the
    largest where they are that small, and their sum is a sum of independent errors (Hoeffding:
    beyond 6 standard bounds once in 10**7). Scores of key outliers are rounded to f16, and f32
    rounds sums of N terms.
    """
    H, N, D = dense.values.shape
    weights = dense.weights.view(H, -1, N)
    spread = torch.einsum("hgn,hnd->hgd", weights**2, dense.values**2).sqrt().flatten(0, 1)
    largest = weights.amax(-1).flatten()[:, None] * dense.values.abs().max()
    outliers = torch.einsum(
        "hgd,hnd->hgn", case.query[row].double().view(H, -1, D), dense.outlier_keys
    )
    score_error = U16 * outliers.abs() * options.scaling + 16 * U32 * dense.scores.abs().view(
        H, -1, N
    )
    away = dense.values[:, None] - dense.output.view(H, -1, 1, D)
    moved = torch.einsum("hgn,hgnd->hgd", weights * score_error, away.abs()).flatten(0, 1)
    absolute = torch.einsum("hgn,hnd->hgd", weights, dense.values.abs()).flatten(0, 1)
    return (
        SIGMAS * 2 * U16 * spread
        + SIGMAS * 2.0**-25 * math.sqrt(N) * largest
        + 1.1 * moved
        + (N + 64) * U32 * absolute
    )


def check(case: PackedCase, device: torch.device, options: AttentionOptions | None = None) -> None:
    options = options or AttentionOptions(scaling=case.scaling)
    found, reference = run(case, options, device), run_reference(case, options)
    for row in range(len(found)):
        dense = dense_row(case, row, options)
        if dense.keys.shape[1] == 0:
            assert (found[row] == 0).all()
            continue
        bound = exact_bound(case, row, dense, options)
        excess = (found[row] - dense.output).abs() / bound
        assert excess.max() <= 1, f"row {row}: {excess.max():.2f} times the bound"
        assert (reference[row] - dense.output).abs().max() <= 1e-5 * dense.values.abs().max()


def expected_error(case: PackedCase, dense: DenseRow, options: AttentionOptions) -> Tensor:
    """Root mean square of what roundings to 16 bits do to the first row, any numbers."""
    H, N, D = dense.values.shape
    away = dense.values[:, None] - dense.output.view(H, -1, 1, D)
    weights = dense.weights.view(H, -1, N)
    # Weights carry their score's error, and two roundings of their own and of a value's scale.
    deviation = score_errors(case, 0, dense, options).view(H, -1, N)
    variance = torch.einsum("hgn,hgnd->hgd", (weights * deviation) ** 2, away**2)
    variance += torch.einsum("hgn,hnd->hgd", weights**2, dense.values**2) * 3 * U16**2 / 3
    return variance.mean().sqrt()
