"""Rotary angles in kernels: fixed-point phases, exact at any position.

An angle ``position * frequency`` of a million positions cannot be held in f32 (``rotary``). Only
its fraction of a full turn counts, and 32-bit integers keep that for nothing: with the frequency F
in units of ``2**-64`` turns, the upper half of the low 64 bits of ``position * F`` is the fraction
in units of ``2**-32`` turns::

    phase = position * F_high + high_half(position * F_low)        modulo 2**32

The phase is off by less than ``2**-32`` turns from rounding down, and by ``position * 2**-65`` from
rounding F, together under ``2**-31`` turns (3e-9 radians) for every position below ``2**31``. No
f64, which is slow or absent on many devices, no table that grows with the context.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels.rotary import RotaryAngles

PHASE_ERROR = 2 * math.pi * 2.0**-31
"""Radians that an angle may be off."""

COS_SIN_ERROR = 3 * 2.0**-24 + PHASE_ERROR
"""What ``cos_sin`` may be off: roundings of the argument, of a product and of the last sum."""


@dataclass(frozen=True)
class Phases:
    """Frequencies of one rotation as kernels read them.

    Fields:
        high, low: i32 ``[R / 2]``, halves of the frequencies in ``2**-64`` turns a position.
        offset_cos, offset_sin: f16 ``[256, R / 2]``, of the places in a page, scaled.
        offset_turns: f16 ``[256, R / 2, 2]``, both side by side.
        scaling: factor of cosines and sines (``RotaryAngles``).
    """

    high: Tensor
    low: Tensor
    offset_cos: Tensor
    offset_sin: Tensor
    offset_turns: Tensor
    scaling: float

    @classmethod
    def of(cls, angles: RotaryAngles, *, device: torch.device | str) -> Phases:
        """Convert; waits for the device where the frequencies lie, so keep the result."""
        steps = [
            round(Fraction(frequency) / Fraction(2 * math.pi) * 2**64) % 2**64
            for frequency in angles.frequencies.tolist()
        ]
        halves = torch.tensor([[step >> 32, step & 0xFFFFFFFF] for step in steps]).reshape(-1, 2)
        high, low = halves.to(torch.int32).T.contiguous().to(device)
        cos, sin = angles.cos_sin(torch.arange(PAGE_TOKENS, device=angles.frequencies.device))
        cos, sin = cos.half().to(device), sin.half().to(device)
        turns = torch.stack([cos, sin], dim=-1)
        return cls(high, low, cos, sin, turns, angles.scaling)


_KNOWN: weakref.WeakKeyDictionary[RotaryAngles, dict[torch.device, Phases]] = (
    weakref.WeakKeyDictionary()
)


def phases_of(angles: RotaryAngles, *, device: torch.device) -> Phases:
    """``Phases.of``, made once for each object of angles and device."""
    known = _KNOWN.setdefault(angles, {})
    if device not in known:
        known[device] = Phases.of(angles, device=device)
    return known[device]


@triton.jit
def cos_sin(position, high, low):
    """Cosine and sine, f32, of integer positions and frequencies (i32, broadcast together).

    A quarter turn is split off in integers; polynomials (minimax over an eighth of a turn each
    way, off by 3e-9 and 5e-11) do the rest.
    """
    position = position.to(tl.uint32, bitcast=True)
    low = low.to(tl.uint32, bitcast=True)
    position, low = tl.broadcast(position, low)
    phase = position * high.to(tl.uint32, bitcast=True) + tl.umulhi(position, low)
    quadrant = (phase + 0x20000000) >> 30
    rest = (phase - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 2.3283064365386963e-10
    y = x * x
    cos = (59.22040691693123 * y - 85.44285211087264) * y + 64.93931620836072
    cos = (cos * y - 19.739208650357718) * y + 1.0
    sin = (-75.39356281789031 * y + 81.59235355478062) * y - 41.34166145492326
    sin = (sin * y + 6.283185286833361) * x
    odd = (quadrant & 1) != 0
    turned_cos = tl.where(odd, sin, cos)
    turned_sin = tl.where(odd, cos, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -turned_cos, turned_cos)
    sin = tl.where((quadrant & 2) != 0, -turned_sin, turned_sin)
    return cos, sin
