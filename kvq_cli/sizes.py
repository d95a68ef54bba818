"""Sizes as people write and read them: tokens as 4096, 32k or 1M, bytes as 2.1 GiB."""

from __future__ import annotations

import re

from kvq_formats.config import LARGEST_CONTEXT
from kvq_formats.errors import ConfigError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_TOKENS = re.compile(r"([0-9]+) ?([kM]?)", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1024, "m": 1024**2}


def parse_tokens(text: str, *, flag: str) -> int:
    """``4096``, ``32k`` (k is 1024) or ``1M`` (1024 k) to a number of tokens.

    Raises ConfigError that names ``flag``.
    """
    match = _TOKENS.fullmatch(text.strip())
    tokens = int(match[1]) * _FACTORS[match[2].lower()] if match else 0
    if not 1 <= tokens <= LARGEST_CONTEXT:
        raise ConfigError(
            f"{flag} is {text!r}, expected tokens, at least 1 and below 2048M: a whole number, "
            "also with k (1,024) or M (1,024 k).",
            hint=f"{flag} 4096, 32k, 1M or 10M",
        )
    return tokens


def show_tokens(tokens: int) -> str:
    """``8192`` as ``8k``, ``1048576`` as ``1M``; what is no multiple as it is."""
    for suffix in ("M", "k"):
        if tokens and tokens % _FACTORS[suffix.lower()] == 0:
            return f"{tokens // _FACTORS[suffix.lower()]}{suffix}"
    return str(tokens)


def context_for(tokens: int) -> str:
    """The shortest context in k that has room for ``tokens``, as an argument."""
    return show_tokens(-(-tokens // 1024) * 1024)


def context_within(tokens: int) -> str:
    """The longest context of at most ``tokens``, as an argument; in k where that is fine enough."""
    return show_tokens(tokens // 1024 * 1024 if tokens >= 16 * 1024 else tokens)


def show_bytes(count: int) -> str:
    """``2.1 GiB``, ``312 MiB``, ``6.0 MiB``, ``512 KiB``."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    if count >= MIB:
        return f"{count / MIB:.{1 if count < 10 * MIB else 0}f} MiB"
    return f"{count / KIB:.0f} KiB"
