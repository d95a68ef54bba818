"""Codes <-> packed words. The bit diagram lives here and nowhere else.

A page holds 256 tokens of one key/value head. Codes are packed *along tokens*: token ``t`` is row
``u = t % 16`` of subset ``t // 16``, and one 32-bit word holds codes of one row from several
subsets, for two neighbours on the fast axis: two channels ``c, c + 1`` for keys, two rows
``u, u + 1`` for values. So a kernel that loads a word gets operands for matrix instructions
without moving anything between lanes.

4 bits: 4 planes of 64 tokens (subsets j = 0..3). A word, lowest nibble first::

    [a j0 | b j0 | a j1 | b j1]  [a j2 | b j2 | a j3 | b j3]      a, b: the two neighbours
     int16 of neighbour a         int16 of neighbour b

3 bits: 3 planes of 64 tokens as above, codes in the low three bits of a nibble. The fourth bit of
the nibbles of plane p carries bit p of the codes of tokens 192..255: 32 codes in three words.

2 bits: 2 planes of 128 tokens (subsets j = 0..7); code j of a at bit ``2 (j mod 4) + 16 (j / 4)``,
that of b eight bits higher::

    [a j0..j3 | b j0..j3]  [a j4..j7 | b j4..j7]

A plane takes ``32 D`` bytes, so a page takes exactly ``bits`` planes, at every width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import ConfigError

ROWS = 16
"""Tokens of a subset: the rows of one matrix-instruction tile."""

PLANE_BYTES_PER_CHANNEL = 2 * ROWS


def _nibble_words(nibbles: Tensor) -> Tensor:
    """Nibbles i32 ``[..., J=4, S, F]`` -> words i16 ``[..., S, F]``, pairs along F."""
    *lead, _, slow, fast = nibbles.shape
    # [..., half of the word, subset in the half, S, pair, neighbour]
    parts = nibbles.reshape(*lead, 2, 2, slow, fast // 2, 2)
    shifts = torch.tensor([[0, 4], [8, 12]], device=nibbles.device, dtype=torch.int32)
    words = (parts << shifts[:, None, None, :]).sum(dim=(-4, -1), dtype=torch.int32)
    return words.movedim(-3, -1).reshape(*lead, slow, fast).to(torch.int16)


def _word_nibbles(words: Tensor) -> Tensor:
    """Inverse of ``_nibble_words``: i16 ``[..., S, F]`` -> i32 ``[..., 4, S, F]``."""
    *lead, slow, fast = words.shape
    halves = words.int().reshape(*lead, slow, fast // 2, 2).movedim(-1, -3)
    shifts = torch.tensor([[0, 4], [8, 12]], device=words.device, dtype=torch.int32)
    parts = (halves[..., None, :, :, None] >> shifts[:, None, None, :]) & 0xF
    return parts.reshape(*lead, 4, slow, fast)


def _pack_tiles(tiles: Tensor, bits: int) -> Tensor:
    """Codes i32 ``[..., 16 subsets, S, F]`` -> words i16 ``[..., bits, S, F]``."""
    *lead, _, slow, fast = tiles.shape
    if bits == 4:
        return _nibble_words(tiles.reshape(*lead, 4, 4, slow, fast))
    if bits == 3:
        groups = tiles.reshape(*lead, 4, 4, slow, fast)
        spare = groups[..., 3, :, :, :]
        planes = [groups[..., p, :, :, :] | ((spare >> p & 1) << 3) for p in range(3)]
        return _nibble_words(torch.stack(planes, dim=-4))
    parts = tiles.reshape(*lead, 2, 2, 4, slow, fast // 2, 2)
    shifts = torch.tensor([[0, 8], [2, 10], [4, 12], [6, 14]], dtype=torch.int32)
    shifted = parts << shifts.to(tiles.device)[:, None, None, :]
    words = shifted.sum(dim=(-4, -1), dtype=torch.int32)
    return words.movedim(-3, -1).reshape(*lead, 2, slow, fast).to(torch.int16)


def _unpack_tiles(words: Tensor, bits: int) -> Tensor:
    """Inverse of ``_pack_tiles``: i16 ``[..., bits, S, F]`` -> i32 ``[..., 16, S, F]``."""
    *lead, _, slow, fast = words.shape
    if bits == 4:
        return _word_nibbles(words).reshape(*lead, 16, slow, fast)
    if bits == 3:
        nibbles = _word_nibbles(words)
        tops = [(nibbles[..., p, :, :, :] >> 3) << p for p in range(3)]
        spare = tops[0] | tops[1] | tops[2]
        groups = torch.cat([nibbles & 7, spare[..., None, :, :, :]], dim=-4)
        return groups.reshape(*lead, 16, slow, fast)
    halves = words.int().reshape(*lead, 2, slow, fast // 2, 2).movedim(-1, -3)
    shifts = torch.tensor([[0, 8], [2, 10], [4, 12], [6, 14]], dtype=torch.int32)
    parts = (halves[..., None, :, :, None] >> shifts.to(words.device)[:, None, None, :]) & 3
    return parts.reshape(*lead, 16, slow, fast)


def _check(bits: int, tokens: int, channels: int) -> None:
    if bits not in (2, 3, 4):
        raise ConfigError(f"codes of {bits} bits cannot be packed; 2, 3 and 4 can.")
    if tokens != PAGE_TOKENS or channels % 2:
        raise ConfigError(
            f"a page is {PAGE_TOKENS} tokens of an even number of channels, not "
            f"{tokens} tokens of {channels}."
        )


def pack_keys(codes: Tensor, *, bits: int) -> Tensor:
    """Pack key codes u8 ``[..., 256, D]`` into words i16 ``[..., bits, 16 rows, D]``."""
    *lead, tokens, channels = codes.shape
    _check(bits, tokens, channels)
    return _pack_tiles(codes.int().reshape(*lead, 16, ROWS, channels), bits)


def unpack_keys(words: Tensor, *, bits: int) -> Tensor:
    """Inverse of ``pack_keys``: codes u8 ``[..., 256, D]``."""
    *lead, _, _, channels = words.shape
    tiles = _unpack_tiles(words, bits)
    return tiles.reshape(*lead, PAGE_TOKENS, channels).to(torch.uint8)


def pack_values(codes: Tensor, *, bits: int) -> Tensor:
    """Pack value codes u8 ``[..., 256, D]`` into words i16 ``[..., bits, D, 16 rows]``."""
    *lead, tokens, channels = codes.shape
    _check(bits, tokens, channels)
    return _pack_tiles(codes.int().reshape(*lead, 16, ROWS, channels).transpose(-1, -2), bits)


def unpack_values(words: Tensor, *, bits: int) -> Tensor:
    """Inverse of ``pack_values``: codes u8 ``[..., 256, D]``."""
    *lead, _, channels, _ = words.shape
    tiles = _unpack_tiles(words, bits).transpose(-1, -2)
    return tiles.reshape(*lead, PAGE_TOKENS, channels).to(torch.uint8)
