"""Attention of a ``PackedCase`` by the book, in f64, and what 16 bits may change of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.pages import decode_keys, decode_values
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.packed_rows import CUT_SHIFT, PAGE_ID_MASK
from packed_cases import PackedCase, pages_of

U16 = 2.0**-11
"""Relative rounding of f16, and of tf32."""

U32 = 2.0**-24


@dataclass
class DenseRow:
    """One row in f64, and its attention.

    Fields:
        keys, values: ``[H, N, D]``; keys rotated.
        outlier_keys: what of the keys comes from outliers, rotated.
        sizes: ``[H, N, D]``, ``|half_range * z| + |center|`` of keys before rotation, 0 for exact
            ones: what f16 arithmetic rounds.
        weights: ``[HQ, N]``; ``scores`` before the softmax.
        output: ``[HQ, D]``.
    """

    keys: Tensor
    values: Tensor
    outlier_keys: Tensor
    sizes: Tensor
    scores: Tensor
    weights: Tensor
    output: Tensor


def _rotated(case: PackedCase, keys: Tensor, positions: Tensor) -> Tensor:
    angles = positions.double()[:, None] * case.angles.frequencies.cpu()
    cos, sin = angles.cos() * case.angles.scaling, angles.sin() * case.angles.scaling
    half = angles.shape[1]
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1)


def dense_row(case: PackedCase, row: int, options: AttentionOptions) -> DenseRow:
    """Row ``row`` of a case whose tensors are on the CPU."""
    rows, key = case.rows, case.parameters.key
    pages, sinks, tail = rows.lengths[row].tolist()
    D = case.query.shape[-1]
    H = rows.exact_keys.shape[1]
    key_pages, value_pages = pages_of(case)
    P = key_pages.words.shape[0]
    decoded = decode_keys(key_pages, key, tokens=P * PAGE_TOKENS).double()
    none = replace(key_pages, outliers=key_pages.outliers[..., :0])
    plain = decode_keys(none, key, tokens=P * PAGE_TOKENS).double()
    values = decode_values(value_pages, case.parameters.value, tokens=P * PAGE_TOKENS).double()
    ids = rows.block_table[row, :pages]
    tokens = [
        torch.arange(PAGE_TOKENS - int(entry >> CUT_SHIFT))
        + int(entry & PAGE_ID_MASK) * PAGE_TOKENS
        for entry in ids
    ]
    places = torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64)
    positions = (key_pages.base_positions[:, None] + torch.arange(PAGE_TOKENS)).flatten()
    for page, base in enumerate(key_pages.base_positions.tolist()):
        if base < 0:
            assert rows.irregular_positions is not None
            positions[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = rows.irregular_positions[
                -1 - base
            ]
    held = sinks + tail
    exact = rows.exact_keys[row, :, :held].double()
    kept = _rotated(case, exact, rows.exact_positions[row, :held])
    coded = positions[places]
    keys = torch.cat([_rotated(case, decoded[:, places], coded), kept], dim=1)
    outliers = _rotated(case, (decoded - plain)[:, places], coded)
    center = key.center.double()[:, None]
    sizes = (plain - center).abs() + center.abs()
    padding = torch.zeros(H, held, D, dtype=torch.float64)
    values = torch.cat([values[:, places], rows.exact_values[row, :, :held].double()], dim=1)
    query = case.query[row].double()
    G = query.shape[0] // H
    scores = torch.einsum("hgd,hnd->hgn", query.view(H, G, D), keys).flatten(0, 1)
    scores = scores * options.scaling
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    shown = scores
    if options.sink_logits is not None:
        shown = torch.cat([scores, options.sink_logits.double().cpu()[:, None]], dim=1)
    weights = shown.softmax(-1)[:, : scores.shape[1]] if scores.shape[1] else scores
    output = torch.einsum("hgn,hnd->hgd", weights.view(H, G, -1), values).flatten(0, 1)
    return DenseRow(
        keys=keys,
        values=values,
        outlier_keys=torch.cat([outliers, padding], dim=1),
        sizes=torch.cat([sizes[:, places], padding], dim=1),
        scores=scores,
        weights=weights,
        output=output,
    )


def score_errors(case: PackedCase, row: int, dense: DenseRow, options: AttentionOptions) -> Tensor:
    """Standard deviations of scores ``[HQ, N]`` that roundings to 16 bits explain.

    Of a key before rotation: its entry, half-range, centre, product and sum; of the rotation:
    cosines and sines, products and the sum; of the query: one. Each is off by up to ``U16`` of
    what it rounds, uniformly: a variance of ``U16**2 / 3``. Rotating mixes the members of a pair,
    which has both their sizes. Of scores of outliers it is the query, cosines and sines, and the
    whole.
    """
    H, _, D = dense.keys.shape
    half = len(case.angles.frequencies)
    query = case.query[row].double().view(H, -1, D)

    def paired(x: Tensor) -> Tensor:
        squares = x**2
        pair = squares[..., :half] + squares[..., half : 2 * half]
        return torch.cat([pair, pair, squares[..., 2 * half :]], dim=-1)

    roundings = 5 + 4 + 1
    channels = torch.einsum("hgd,hnd->hgn", paired(query), paired(dense.sizes)) / 2
    outliers = torch.einsum("hgd,hnd->hgn", query, dense.outlier_keys) ** 2
    variance = (roundings * channels + 3 * outliers) * (options.scaling * U16) ** 2 / 3
    return variance.sqrt().flatten(0, 1)
