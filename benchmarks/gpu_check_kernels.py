"""Each kernel against its reference in plain torch: the largest error over what is allowed.

Packing is compared byte for byte. Decoding is held to what roundings to 16 bits explain
(``dense_attention.score_errors``), against attention by the book in f64. Prefill and dequantizing
are compared with their references by norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from gpu_baselines import relative_error
from gpu_cases import SINKS, TABLE_MULTIPLE, PackedLayerTables, ReferencePages, random_feedback
from gpu_shapes import Codes, Shape
from torch import Tensor

from dense_attention import U16, dense_row, score_errors
from kvq_formats import pages
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.parameters import LayerParameters
from kvq_kernels import attention
from kvq_kernels.attention import AttentionOptions, ExactTokens
from kvq_kernels.decode import decode
from kvq_kernels.dequantize import apply_scales
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.phases import Phases
from kvq_kernels.rotary import rotate
from packed_cases import PackedCase, make_case, on_device
from poisoned import PoisonedWorkspace

TOKENS = (800, 300)
SMALL_TOKENS = (300, 2)
DEVIATIONS = 1.5
"""Of what independent roundings explain, the root mean square may be this much."""

PREFILL_ERROR = 5e-3
"""Relative, by norms: some ten roundings to 16 bits, of 2**-11 at most each."""

DEQUANTIZE_ERROR = 1e-5
"""Of the largest number: a dozen roundings to f32, and what outliers add to a pair."""


def _case(shape: Shape, codes: Codes) -> PackedCase:
    """Made on the CPU by the specification, with 16-bit numbers as a model gives them."""
    return make_case(
        tokens=TOKENS if shape.head_dim > 16 else SMALL_TOKENS,
        key_bits=codes.bits,
        value_bits=codes.bits,
        D=shape.head_dim,
        H=shape.num_kv_heads,
        G=shape.group,
        outlier_fraction=codes.outlier_fraction,
        exact=False,
        dtype=torch.bfloat16,
    )


def check_decode(shape: Shape, codes: Codes, device: torch.device) -> float:
    """Root mean square error of a row over what roundings explain."""
    case = _case(shape, codes)
    options = AttentionOptions(scaling=case.scaling)
    rows = on_device(case.rows, device)
    # As wide as block tables are that are measured: kernels are compiled for a multiple of 16.
    missing = -rows.block_table.shape[1] % TABLE_MULTIPLE
    table = torch.nn.functional.pad(rows.block_table, (0, missing))
    found = decode(
        case.query.to(device),
        replace(rows, block_table=table),
        KernelTables.of(case.parameters, case.config, device=device),
        Phases.of(case.angles, device=device),
        options=options,
        workspace=PoisonedWorkspace(),
    )
    worst = 0.0
    for place, row in enumerate(found.cpu().double()):
        dense = dense_row(case, place, options)
        error = (row - dense.output).square().mean().sqrt()
        allowed = DEVIATIONS * _explained(case, place, dense, options)
        worst = max(worst, _number(error / allowed))
    return worst


def _explained(case: PackedCase, place: int, dense: Any, options: AttentionOptions) -> Tensor:
    """Root mean square of errors: of scores, and of weights, values' scales and exact factors."""
    H, N, D = dense.values.shape
    weights = dense.weights.view(H, -1, N)
    away = dense.values[:, None] - dense.output.view(H, -1, 1, D)
    deviation = score_errors(case, place, dense, options).view(H, -1, N)
    variance = torch.einsum("hgn,hgnd->hgd", (weights * deviation) ** 2, away**2)
    # A weight is rounded twice and a value's entry once; tf32 cuts exact ones by as much.
    variance += torch.einsum("hgn,hnd->hgd", weights**2, dense.values**2) * 3 * U16**2 / 3
    return variance.mean().sqrt()


def check_pack(shape: Shape, codes: Codes, device: torch.device) -> float:
    """Bytes that differ from the specification's; none is allowed, so that one is infinite.

    With error feedback and without, as packing is timed.
    """
    case = _case(shape, codes)
    H, D = shape.num_kv_heads, shape.head_dim
    key, value = (
        replace(part, feedback=random_feedback(H, D))
        for part in (case.parameters.key, case.parameters.value)
    )
    shaped = replace(case, parameters=LayerParameters(key=key, value=value))
    plain = replace(case, config=case.config.model_copy(update={"feedback": False}))
    return max(_differing(one, _layer(one, device), shape, device) for one in (shaped, plain))


def _differing(
    case: PackedCase, layer: PackedLayerTables, shape: Shape, device: torch.device
) -> float:
    generator = torch.Generator().manual_seed(9)
    size = (shape.num_kv_heads, 2 * PAGE_TOKENS, shape.head_dim)
    keys, values = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    pairs = (
        (layer.keys.pack(keys.to(device)), pages.encode_keys(keys.float(), case.parameters.key,
                                                              case.config)),
        (layer.values.pack(values.to(device)), pages.encode_values(values.float(),
                                                                    case.parameters.value,
                                                                    case.config)),
    )  # fmt: skip
    differing = 0
    for found, expected in pairs:
        for part in fields(expected):
            if part.name == "base_positions":
                continue
            got, want = getattr(found, part.name).cpu(), getattr(expected, part.name)
            differing += int((got.view(torch.uint8) != want.view(torch.uint8)).sum())
    return float("inf") if differing else 0.0


def check_dequantize(shape: Shape, codes: Codes, device: torch.device) -> float:
    """Largest difference in f32 over what is allowed, keys rotated, and values."""
    from kvq_kernels.dequantize_pages import dequantize_keys, dequantize_values

    case = _case(shape, codes)
    layer, reference = _layer(case, device), _reference(case, "cpu")
    rows = on_device(case.rows, device)
    found = (
        dequantize_keys(rows.key_pages, None, layer.tables, layer.phases, dtype=torch.float32),
        dequantize_values(rows.value_pages, None, layer.tables, dtype=torch.float32),
    )
    decoded = reference.read(0, len(reference.lengths))
    values = apply_scales(decoded.values, decoded.half_range, decoded.center)
    values = values.mT if values.shape[-1] != shape.head_dim else values
    worst = 0.0
    for got, want in zip(found, (decoded.keys, values), strict=True):
        want = want.transpose(0, 1).flatten(1, 2)
        assert got.shape == want.shape, (got.shape, want.shape)
        error = (got.cpu() - want).abs().max() / want.abs().max()
        worst = max(worst, _number(error / DEQUANTIZE_ERROR))
    return worst


def check_prefill(shape: Shape, codes: Codes, device: torch.device) -> float:
    """A chunk that completed a page after pages that were held; relative error by norms."""
    from kvq_kernels.prefill import KernelPages, attend

    case = _case(shape, codes)
    layer, reference = _layer(case, device), _reference(case, "cpu")
    rows = on_device(case.rows, device)
    P, held = len(reference.lengths), len(reference.lengths) - 1
    queries = PAGE_TOKENS + 70
    generator = torch.Generator().manual_seed(11)
    H, D = shape.num_kv_heads, shape.head_dim
    query = torch.randn(shape.num_heads, queries, D, generator=generator).bfloat16()
    keys, values = (torch.randn(H, SINKS + queries, D, generator=generator) for _ in range(2))
    start = SINKS + held * PAGE_TOKENS
    positions = torch.cat([torch.arange(SINKS), start + torch.arange(queries)])
    keys = rotate(keys, *case.angles.cos_sin(positions))

    def exact(where: torch.device | str) -> ExactTokens:
        return ExactTokens(keys.to(where), values.bfloat16().to(where), sinks=SINKS, start=start)

    how = {
        "index": start,
        "held_pages": held,
        "recent_tokens": 0,
        "options": AttentionOptions(scaling=case.scaling),
    }
    found = attend(
        query.to(device),
        pages=KernelPages(
            key_pages=rows.key_pages,
            value_pages=rows.value_pages,
            ids=torch.arange(P, device=device),
            lengths=reference.lengths,
            ends=reference.ends,
            tables=layer.tables,
            phases=layer.phases,
            workspace=PoisonedWorkspace(),
        ),
        exact=exact(device),
        **how,
    )
    expected = attention.attend(query.double(), pages=reference, exact=exact("cpu"), **how)
    return _number(relative_error(found.cpu(), expected) / PREFILL_ERROR)


def _layer(case: PackedCase, device: torch.device) -> PackedLayerTables:
    return PackedLayerTables.with_parameters(
        case.parameters, case.config, case.angles, device=device
    )


def _reference(case: PackedCase, device: torch.device | str) -> ReferencePages:
    """The case's pool as the pages of one row, in the order of the pool."""
    rows = on_device(case.rows, device)
    P = rows.key_pages.words.shape[0]
    rows.key_pages.base_positions.copy_(SINKS + PAGE_TOKENS * torch.arange(P))
    case.rows.key_pages.base_positions.copy_(SINKS + PAGE_TOKENS * torch.arange(P))
    return ReferencePages(
        key_pages=rows.key_pages,
        value_pages=rows.value_pages,
        parameters=case.parameters,
        config=case.config,
        angles=case.angles,
        lengths=[PAGE_TOKENS] * P,
        ends=[SINKS + PAGE_TOKENS * (page + 1) - 1 for page in range(P)],
    )


def _number(x: Tensor | float) -> float:
    """NaN is beyond every bound, also behind ``max``."""
    number = float(x)
    return number if number == number else float("inf")


CHECKS: dict[str, Callable[[Shape, Codes, torch.device], float]] = {
    "decode": check_decode,
    "pack": check_pack,
    "dequantize": check_dequantize,
    "prefill": check_prefill,
}
