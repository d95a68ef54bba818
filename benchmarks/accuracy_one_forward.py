"""A sidecar measured as a baseline is: in one forward on both paths."""

from __future__ import annotations

from collections.abc import Mapping

from kvq_evaluation.caches import sidecar_bits
from kvq_formats.sidecar import Sidecar
from kvq_runtime.sidecar_codec import SidecarCodec


class OneForward(SidecarCodec):
    """A sidecar's codec, with its bits.

    What it reads under the runtime rule is what decoding token by token reads from the packed
    cache, up to the order of sums (``tests/runtime/test_own_page.py``).
    """

    def effective_bits(self, num_kv_heads: int, head_dim: int, *, tokens: int) -> float:
        """Bits a cached number of a text of ``tokens`` tokens, as ``kvq eval`` counts them."""
        shape = self.sidecar.base_model.fingerprint
        assert (shape.num_kv_heads, shape.head_dim) == (num_kv_heads, head_dim)
        return sidecar_bits(self.sidecar, tokens=tokens)[0]


def as_codecs(sidecars: Mapping[str, Sidecar]) -> dict[str, OneForward]:
    """Each of them, by its name."""
    return {name: OneForward(sidecar) for name, sidecar in sidecars.items()}
