"""Effective bits as the commands show them: what a cached number really costs, by purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq_formats.config import KVQConfig
    from kvq_formats.effective_bits import EffectiveBits
    from kvq_formats.fingerprint import Fingerprint

PARTS = ("codes", "scales", "outliers", "positions", "sinks", "recent", "unfinished")


def reported_bits(config: KVQConfig, fingerprint: Fingerprint) -> EffectiveBits:
    """Effective bits of a model with this fingerprint, at the length that sidecars state."""
    from kvq_formats.effective_bits import effective_bits
    from kvq_formats.sidecar import REPORTED_TOKENS

    return effective_bits(
        config,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        tokens=REPORTED_TOKENS,
    )


def codes_in_words(config: KVQConfig) -> str:
    """``keys 2 bits, values 3 bits``; where layers differ their range and mean."""
    key_bits, value_bits = config.bits_in_words()
    return f"keys {key_bits}, values {value_bits}"


def bits_facts(bits: EffectiveBits) -> list[tuple[str, str]]:
    """Rows for people: the figure that methods are compared on first, then what it is made of."""
    return [
        ("effective bits", f"{bits.without_unfinished:.3f} a number at {bits.tokens:,} tokens"),
        ("with unfinished", f"{bits.total:.3f}, made of"),
        *((f"  {name}", f"{getattr(bits, name):.3f}") for name in PARTS),
        ("complete pages", f"keys {bits.key_bits:.3f}, values {bits.value_bits:.3f}"),
        ("static tables", f"{bits.table_bytes:,} bytes a layer, once"),
    ]


def bits_json(bits: EffectiveBits) -> dict[str, Any]:
    """The same numbers under their field names."""
    return dict(bits.to_json())
