"""Rotary position embeddings from angles that are exact at any position.

An angle is ``position * frequency``. In f32 it is off by up to ``angle * 2**-24``: 0.6 radians for
an angle of 10 M. Here angles are made in f64, which is off by 1e-9 there, and cosines and sines are
rounded once, to f32. Bounds below hold for angles up to ``2**25`` radians.

Channels lie in rotary channel order: first members of the ``R / 2`` rotary pairs, their second
members, then channels that are not rotated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class RotaryAngles:
    """How far a position turns each rotary pair.

    Fields:
        frequencies: f64 ``[R / 2]``, radians a position.
        scaling: factor of all cosines and sines (YaRN and longrope scale their vectors by it).
    """

    frequencies: Tensor
    scaling: float = 1.0
    # Frequencies, and cosines and sines of the 256 offsets in a page, by device.
    _on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def same_as(self, other: RotaryAngles) -> bool:
        """Whether every position is turned alike."""
        return self is other or (
            self.scaling == other.scaling
            and torch.equal(self.frequencies.cpu(), other.frequencies.cpu())
        )

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines and sines, f32 ``[..., R / 2]``, of integer ``positions`` ``[...]``.

        Within ``1.1 * 2**-24 * scaling`` of the exact value: rounded once, and the angle is off by
        at most ``2**25 * 2**-53``.
        """
        frequencies, _, _ = self._tables(positions.device)
        cos, sin = _cos_sin(positions, frequencies)
        return cos.mul_(self.scaling).float(), sin.mul_(self.scaling).float()

    def page_cos_sin(self, base_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines and sines, f32 ``[P, 256, R / 2]``, of the positions of whole pages.

        Page ``p`` holds positions ``base_positions[p]`` (int32 or int64 ``[P]``) to
        ``base_positions[p] + 255``. Composed in f32 from the base a and the offset b::

            cos(a + b) = cos(a) cos(b) - sin(a) sin(b)
            sin(a + b) = sin(a) cos(b) + cos(a) sin(b)

        which takes no cosine an element. Within ``4.1 * 2**-24 * scaling`` of the exact value: with
        ``u = 2**-24``, both factors of a product and the product itself are rounded, which moves
        the sum of two products by at most ``3 u (|cos a cos b| + |sin a sin b|) <= 3 u``, and
        rounding the sum by ``u`` more. What is left are terms of order ``u**2`` and the f64 angles.
        """
        frequencies, offset_cos, offset_sin = self._tables(base_positions.device)
        base_cos, base_sin = (part.float() for part in _cos_sin(base_positions, frequencies))
        base_cos, base_sin = base_cos[:, None], base_sin[:, None]
        cos = torch.mul(base_cos, offset_cos).addcmul_(base_sin, offset_sin, value=-1)
        sin = torch.mul(base_sin, offset_cos).addcmul_(base_cos, offset_sin)
        return cos, sin

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on_device:
            frequencies = self.frequencies.to(device)
            offsets = torch.arange(PAGE_TOKENS, device=device)
            cos, sin = _cos_sin(offsets, frequencies)
            self._on_device[device] = (
                frequencies,
                cos.mul_(self.scaling).float(),
                sin.mul_(self.scaling).float(),
            )
        return self._on_device[device]


def _cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines in f64, ``[..., R / 2]``."""
    angles = positions.double()[..., None] * frequencies
    return angles.cos(), angles.sin_()


@torch.no_grad()
def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rotate vectors ``x`` by angles whose cosines and sines are given; no gradient flows through.

    Args:
        x: ``[..., T, D]``, any float dtype, in rotary channel order.
        cos, sin: f32, broadcast to ``[..., T, R / 2]`` with ``R <= D``.
        out: f32, like ``x``, where the result goes; ``x`` itself rotates in place, which is
            fastest.

    Returns: f32 ``[..., T, D]``; a pair ``(x1, x2)`` becomes
    ``(x1 cos - x2 sin, x2 cos + x1 sin)``, computed in f32.
    """
    if x.dtype != torch.float32:
        x = x.float()
        # The copy is ours, so that it can be rotated in place.
        out = x if out is None else out
    if out is None:
        out = torch.empty_like(x)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    if out is x:
        crossed = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(crossed)
        return out
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
