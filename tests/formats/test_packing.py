"""Packed words against the bit diagram, written out as a naive loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats import packing
from kvq_formats.errors import ConfigError


def naive_words(codes: Tensor, bits: int, *, along_tokens: bool) -> list[list[list[int]]]:
    """Words of one page ``[256, D]`` by the diagram, one code at a time.

    ``along_tokens``: pairs are rows u, u + 1 (values); else channels c, c + 1 (keys).
    """
    tokens, channels = codes.shape
    slow, fast = (channels, 16) if along_tokens else (16, channels)
    pairs = [[[0] * (fast // 2) for _ in range(slow)] for _ in range(bits)]
    for t in range(tokens):
        subset, row = divmod(t, 16)
        for c in range(channels):
            code = int(codes[t, c])
            i, f = (c, row) if along_tokens else (row, c)
            pair, odd = divmod(f, 2)
            if bits == 2:
                plane, j = divmod(subset, 8)
                pairs[plane][i][pair] |= code << (2 * (j % 4) + 16 * (j // 4) + 8 * odd)
            elif bits == 4 or subset < 12:
                plane, j = divmod(subset, 4)
                pairs[plane][i][pair] |= code << (4 * (2 * j + odd))
            else:
                for plane in range(3):
                    bit = code >> plane & 1
                    pairs[plane][i][pair] |= bit << (4 * (2 * (subset - 12) + odd) + 3)
    return pairs


def as_pairs(words: Tensor) -> list[list[list[int]]]:
    """i16 ``[bits, S, F]`` -> unsigned 32-bit pairs, as a little-endian load sees them."""
    low, high = words.int()[..., ::2] & 0xFFFF, words.int()[..., 1::2] & 0xFFFF
    return (low.long() | high.long() << 16).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_follow_the_diagram(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (256, 6), dtype=torch.uint8)
    keys = packing.pack_keys(codes, bits=bits)
    assert keys.shape == (bits, 16, 6)
    assert as_pairs(keys) == naive_words(codes, bits, along_tokens=False)
    values = packing.pack_values(codes, bits=bits)
    assert values.shape == (bits, 6, 16)
    assert as_pairs(values) == naive_words(codes, bits, along_tokens=True)


def test_spare_bits_of_three_words_are_the_fourth_group() -> None:
    codes = torch.randint(0, 8, (256, 4), dtype=torch.uint8)
    w0, w1, w2 = (w & 0xFFFF for w in packing.pack_keys(codes, bits=3).int())
    spare = (w0 >> 3 & 0x1111) | (w1 >> 2 & 0x2222) | (w2 >> 1 & 0x4444)
    fourth = torch.zeros(64, 4, dtype=torch.uint8)
    fourth[:] = codes[192:]
    # As the first group of a page that holds these tokens first.
    moved = torch.cat([fourth, torch.zeros(192, 4, dtype=torch.uint8)])
    assert torch.equal(spare, packing.pack_keys(moved, bits=3)[0].int() & 0xFFFF)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    head_dim=st.sampled_from([2, 16, 64, 80, 96, 128, 256]),
    lead=st.sampled_from([(), (1,), (2, 3), (0, 2)]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits: int, head_dim: int, lead: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (*lead, 256, head_dim), generator=generator).byte()
    keys = packing.pack_keys(codes, bits=bits)
    values = packing.pack_values(codes, bits=bits)
    assert torch.equal(packing.unpack_keys(keys, bits=bits), codes)
    assert torch.equal(packing.unpack_values(values, bits=bits), codes)
    # A page is exactly `bits` planes of 32 bytes a channel, no padding.
    pages = codes.numel() // (256 * head_dim)
    plane = packing.PLANE_BYTES_PER_CHANNEL * head_dim
    assert keys.nbytes == values.nbytes == pages * bits * plane


@pytest.mark.parametrize(
    ("bits", "shape"), [(1, (256, 8)), (5, (256, 8)), (3, (255, 8)), (3, (256, 7))]
)
def test_what_cannot_be_packed_is_refused(bits: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        packing.pack_keys(torch.zeros(shape, dtype=torch.uint8), bits=bits)
