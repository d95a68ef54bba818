"""What the cache of a text takes, packed and as bf16: counted, nothing is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvq_cli.sizes import show_bytes, show_tokens

if TYPE_CHECKING:
    from kvq_cli.checks.layers import LayerGroup
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.resolve import ResolvedModel

BF16_BYTES = 2


@dataclass(frozen=True)
class CacheMemory:
    """Counted bytes of the cache of one row; all layers together.

    Fields:
        tokens: length that totals are of.
        bf16_a_token, packed_a_token: what one more token adds, in layers that are quantized.
        bf16, packed: at ``tokens``, layers that stay as they are included.
        as_it_is: of ``bf16`` and ``packed`` what layers with a window take, which does not grow.
        effective_bits: a cached number of a quantized layer at ``tokens``, without the unfinished
            page, as sidecars state it.
    """

    tokens: int
    bf16_a_token: int
    packed_a_token: float
    bf16: int
    packed: int
    as_it_is: int
    effective_bits: float

    @property
    def ratio(self) -> float:
        """How many times less a token takes."""
        return self.bf16_a_token / self.packed_a_token

    def rows(self) -> list[tuple[str, str, str]]:
        """For people: what, as bf16, packed."""
        at = show_tokens(self.tokens)
        fixed = show_bytes(self.as_it_is)
        rows = [
            ("a token", _exactly(self.bf16_a_token), _exactly(self.packed_a_token)),
            ("bits a number", "16", f"{self.effective_bits:.3f}"),
        ]
        if self.as_it_is:
            rows.append(("layers with a window, at most", fixed, fixed))
        return [*rows, (f"all at {at} tokens", show_bytes(self.bf16), show_bytes(self.packed))]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        found = {name: round(number, 6) for name, number in asdict(self).items()}
        return {**found, "ratio": round(self.ratio, 6)}


def count_cache(
    model: ResolvedModel, sidecar: Sidecar, groups: list[LayerGroup], tokens: int
) -> CacheMemory:
    """Count the bytes of a cache of ``tokens`` tokens with the very code that allocates it."""
    from kvq_formats.config import PAGE_TOKENS
    from kvq_formats.effective_bits import effective_bits
    from kvq_runtime.cache import cache_bytes

    shape = model.record.fingerprint
    vector = 2 * shape.num_kv_heads * shape.head_dim * BF16_BYTES
    # Stock windows hold one token less than they attend to.
    held = [
        (min(tokens, group.window - 1), len(group.layers))
        for group in groups
        if not group.quantized and group.window is not None
    ]
    as_it_is = sum(count * layers * vector for count, layers in held)
    # Twenty pages more of each quantized layer, far beyond every window.
    windows = [group.window for group in groups if group.window is not None]
    far = -(-max([tokens, *windows]) // PAGE_TOKENS) * PAGE_TOKENS
    more = 20 * PAGE_TOKENS
    grown = cache_bytes(model.config, sidecar, capacity=far + more) - cache_bytes(
        model.config, sidecar, capacity=far
    )
    layers = len(sidecar.layers)
    bits = effective_bits(
        sidecar.config,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tokens=tokens,
    )
    return CacheMemory(
        tokens=tokens,
        bf16_a_token=layers * vector,
        packed_a_token=grown / more,
        bf16=layers * vector * tokens + as_it_is,
        packed=cache_bytes(model.config, sidecar, capacity=tokens),
        as_it_is=as_it_is,
        effective_bits=bits.without_unfinished,
    )


def default_tokens(model: ResolvedModel) -> int:
    """Length that is told of where none was asked for: that of sidecars, if the model goes so far.

    A window that all layers have, or the model's positions, may be shorter.
    """
    from kvq_formats.sidecar import REPORTED_TOKENS

    limits = [model.context_limit, model.max_positions]
    return min([REPORTED_TOKENS, *(limit for limit in limits if limit is not None)])


def _exactly(count: float) -> str:
    """Bytes of a token, which are few: with a digit after the point."""
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count:.0f} bytes"
