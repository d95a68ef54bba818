from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_cli.sizes import (
    context_for,
    context_within,
    parse_tokens,
    show_bytes,
    show_tokens,
)
from kvq_formats.config import LARGEST_CONTEXT
from kvq_formats.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1", 1),
        ("4096", 4096),
        ("32k", 32 * 1024),
        ("32K", 32 * 1024),
        ("32 k", 32 * 1024),
        ("1M", 1024**2),
        ("10m", 10 * 1024**2),
        (" 8k ", 8192),
        ("2147483647", LARGEST_CONTEXT),
        ("2047M", 2047 * 1024**2),
    ],
)
def test_accepted_forms(text: str, tokens: int) -> None:
    assert parse_tokens(text, flag="--context") == tokens


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0k", "-1", "12q", "1e30", "1.5k", "k", "1kM", "1,024", "1_024", "1G", "nan",
     "2147483648", "2048M", "9" * 40, "٣", "1\n2"],
)  # fmt: skip
def test_everything_else_names_the_accepted_forms(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tokens(text, flag="--context")
    assert caught.value.message.startswith(f"--context is {text!r}, expected tokens, at least 1")
    assert caught.value.hint == "--context 4096, 32k, 1M or 10M"
    assert caught.value.exit_code == 2


@given(st.integers(1, LARGEST_CONTEXT))
def test_what_is_shown_can_be_given(tokens: int) -> None:
    assert parse_tokens(show_tokens(tokens), flag="--context") == tokens


@given(st.integers(1, LARGEST_CONTEXT - 1024))
def test_contexts_that_are_offered_are_on_the_right_side(tokens: int) -> None:
    longer = parse_tokens(context_for(tokens), flag="--context")
    assert tokens <= longer < tokens + 1024
    shorter = parse_tokens(context_within(tokens), flag="--context")
    assert tokens * 15 / 16 < shorter <= tokens


def test_tokens_are_shown_short() -> None:
    shown = [show_tokens(tokens) for tokens in (1, 1000, 1024, 8192, 1024**2, 3 * 1024**2 + 1024)]
    assert shown == ["1", "1000", "1k", "8k", "1M", "3073k"]


def test_bytes() -> None:
    sizes = (0, 512 * 1024, 1024**2, 10 * 1024**2, 312 * 1024**2, int(2.125 * 1024**3))
    assert [show_bytes(size) for size in sizes] == [
        "0 KiB", "512 KiB", "1.0 MiB", "10 MiB", "312 MiB", "2.1 GiB",
    ]  # fmt: skip
