"""Effective bits: 8 x allocated bytes / cached numbers, by what the bytes are for.

Nothing here is computed from nominal widths: pages are allocated on the ``meta`` device with the
very code that allocates them for use, and their bytes are counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.pages import KeyPages, ValuePages, allocated_bytes

MODEL_DTYPE_BYTES = 2
"""Sinks, recent tokens and the unfinished page stay in the model's 16-bit dtype."""

POSITION_BYTES = 4 + 4
"""A page's base position and its entry in the block table, both int32, shared by all heads."""


@dataclass(frozen=True)
class EffectiveBits:
    """Bits a cached number, keys and values together, at ``tokens`` tokens of one layer.

    Where layers have different widths: of all layers together, which is the mean of the layers.

    Fields:
        codes, scales, outliers, positions: of complete pages; outliers with their counts and
            offsets, positions with the block table.
        sinks, recent, unfinished: tokens that stay in the model's dtype.
        key_bits, value_bits: the shares of complete pages alone, a cached key or value.
        total: the sum.
        without_unfinished: without the unfinished page's bytes and its tokens; methods are
            compared on it.
        table_bytes: static tables of a layer, apart: centre, half-range, codebooks, tables
            of error feedback.
    """

    tokens: int
    codes: float
    scales: float
    outliers: float
    positions: float
    sinks: float
    recent: float
    unfinished: float
    key_bits: float
    value_bits: float
    total: float
    without_unfinished: float
    table_bytes: int

    def to_json(self) -> dict[str, float | int]:
        """Plain numbers, six digits after the point."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def effective_bits(
    config: KVQConfig, *, num_kv_heads: int, head_dim: int, tokens: int
) -> EffectiveBits:
    """Effective bits of a layer's cache that holds ``tokens`` tokens of one row.

    With ``config.layer_bits``: of those layers together, every one counted with its own widths.

    A page is complete when all its tokens are older than ``recent_tokens``; until then they are
    held in the model's dtype, in a page that is allocated whole.
    """
    counts = config.layer_counts()
    layers = [
        (_of_one_layer(layer, num_kv_heads, head_dim, tokens), count)
        for layer, count in counts.items()
    ]
    if len(layers) == 1:
        return layers[0][0]
    total = sum(counts.values())
    mean = {
        field.name: sum(getattr(bits, field.name) * count for bits, count in layers) / total
        for field in fields(EffectiveBits)
    }
    whole = {name: round(mean.pop(name)) for name in ("tokens", "table_bytes")}
    return EffectiveBits(**mean, **whole)


def _of_one_layer(config: KVQConfig, H: int, D: int, tokens: int) -> EffectiveBits:
    sinks = min(config.sink_tokens, tokens)
    recent = min(config.recent_tokens, tokens - sinks)
    pages = (tokens - sinks - recent) // PAGE_TOKENS
    key = allocated_bytes(
        KeyPages.allocate(config, num_pages=pages, num_kv_heads=H, head_dim=D, device="meta")
    )
    value = allocated_bytes(
        ValuePages.allocate(config, num_pages=pages, num_kv_heads=H, head_dim=D, device="meta")
    )
    token_bytes = 2 * H * D * MODEL_DTYPE_BYTES
    parts = {
        "codes": key["words"] + value["words"],
        "scales": value["scales"],
        "outliers": key["outliers"]
        + key["outlier_counts"]
        + value["outliers"]
        + value["outlier_offsets"],
        "positions": pages * POSITION_BYTES,
        "sinks": config.sink_tokens * token_bytes,
        "recent": config.recent_tokens * token_bytes,
        "unfinished": PAGE_TOKENS * token_bytes,
    }
    numbers = 2 * H * D * max(tokens, 1)
    bits = {name: 8 * count / numbers for name, count in parts.items()}
    loose = tokens - sinks - recent - pages * PAGE_TOKENS
    settled = 2 * H * D * max(tokens - loose, 1)
    paged = max(H * D * pages * PAGE_TOKENS, 1)
    return EffectiveBits(
        tokens=tokens,
        **bits,
        key_bits=8 * (sum(key.values()) - key["base_positions"]) / paged,
        value_bits=8 * sum(value.values()) / paged,
        total=sum(bits.values()),
        without_unfinished=8 * (sum(parts.values()) - parts["unfinished"]) / settled,
        table_bytes=_table_bytes(config, H, D),
    )


def _table_bytes(config: KVQConfig, H: int, D: int) -> int:
    """Centre and half-range f32 a channel; entry f32 and level u8 of both codebooks; feedback.

    Of feedback an i16 for the order and an f32 for the shift of each channel, and f16 gains above
    the diagonal, for keys and for values.
    """
    entries = (1 << config.key_bits) + (1 << config.value_bits)
    feedback = 2 * H * (2 * D + 4 * D + 2 * (D * (D - 1) // 2)) if config.feedback else 0
    return 4 * 2 * H * D + 5 * entries + feedback
