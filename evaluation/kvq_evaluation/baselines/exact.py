"""Keys and values as they are: whatever it costs is the evaluation's own error."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from kvq_evaluation.baselines import uniform


@dataclass(frozen=True)
class Exact:
    """A codec that loses nothing, for self-tests.

    Fields:
        layers: the layers that it passes through.
        sink_tokens, recent_tokens: as in ``KVQConfig``; no difference here.
        rotated_keys: whether it is handed keys after RoPE or before.
    """

    layers: Collection[int]
    sink_tokens: int = 1
    recent_tokens: int = 0
    rotated_keys: bool = False

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """The same f32 ``[H, T, D]``."""
        return keys

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """The same f32 ``[H, T, D]``."""
        return values

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """16: the model's dtype."""
        return float(uniform.EXACT_BITS)
