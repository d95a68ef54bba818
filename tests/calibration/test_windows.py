"""Token windows: how text is cut, how windows are chosen, how much text is read."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvq_calibration import windows as windows_module
from kvq_calibration.text_source import LazyTexts, Purpose, TextSource
from kvq_calibration.windows import token_windows
from kvq_formats.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def text(text_file: Path) -> str:
    return text_file.read_text(encoding="utf-8")


def source(text: str, purpose: Purpose = "eval", **options: Any) -> TextSource:
    return TextSource(name="sample", revision=None, texts=[text], purpose=purpose, **options)


def test_evaluation_cuts_the_text_tokenised_once(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    made = token_windows(tokenizer, source(text), num_windows=None, seq_len=64)
    assert made.input_ids.dtype == torch.int64
    assert made.input_ids.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert made.windows_total == len(ids) // 64
    assert not made.partial
    # The tokenizer adds begin-of-text, and only once.
    assert made.input_ids[0, 0] == tokenizer.bos_token_id
    assert (made.input_ids == tokenizer.bos_token_id).sum() == 1


def test_texts_are_joined_by_the_separator(tokenizer: Any) -> None:
    parts = TextSource("s", None, ["the of", "and to"], "eval", separator="\n\n")
    made = token_windows(tokenizer, parts, num_windows=None, seq_len=4)
    whole = tokenizer("the of\n\nand to")["input_ids"]
    assert made.input_ids.flatten().tolist() == whole[: len(whole) // 4 * 4]


def test_a_subset_is_spread_evenly_and_ignores_the_seed(tokenizer: Any, text: str) -> None:
    everything = token_windows(tokenizer, source(text), num_windows=None, seq_len=64)
    some = token_windows(tokenizer, source(text), num_windows=5, seq_len=64, seed=3)
    total = everything.windows_total
    expected = [int((i + 0.5) * total / 5) for i in range(5)]
    assert torch.equal(some.input_ids, everything.input_ids[expected])
    assert some.partial
    assert some.windows_total == total


def test_more_windows_than_there_are(tokenizer: Any, text: str) -> None:
    made = token_windows(tokenizer, source(text), num_windows=10**6, seq_len=64)
    assert not made.partial
    assert len(made.input_ids) == made.windows_total


def test_short_text_is_one_shorter_window(tokenizer: Any) -> None:
    made = token_windows(tokenizer, source("the of and"), num_windows=None, seq_len=64)
    count = len(tokenizer("the of and")["input_ids"])
    assert made.input_ids.shape == (1, count)
    assert made.windows_total == 1
    assert made.notes == (f"sample has {count} tokens: one window of that length, not 64",)


def test_calibration_windows_cover_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    total = len(ids) // 64
    made = token_windows(tokenizer, source(text, "calibrate"), num_windows=8, seq_len=64)
    rows = [ids[i * 64 : (i + 1) * 64] for i in range(total)]
    places = [rows.index(row) for row in made.input_ids.tolist()]
    # One window in each eighth of the text.
    assert [place * 8 // total for place in places] == list(range(8))
    again = token_windows(tokenizer, source(text, "calibrate"), num_windows=8, seq_len=64)
    other = token_windows(tokenizer, source(text, "calibrate"), num_windows=8, seq_len=64, seed=1)
    assert made.token_sha256 == again.token_sha256
    assert made.token_sha256 != other.token_sha256


@pytest.mark.parametrize("seed", range(5))
def test_calibration_takes_distinct_windows_up_to_the_last(
    tokenizer: Any, text: str, seed: int
) -> None:
    total = len(tokenizer(text)["input_ids"]) // 64
    for count in (total, total - 1):
        made = token_windows(
            tokenizer, source(text, "calibrate"), num_windows=count, seq_len=64, seed=seed
        )
        assert len({tuple(row) for row in made.input_ids.tolist()}) == count


def test_hash_is_of_little_endian_ids(tokenizer: Any, text: str) -> None:
    made = token_windows(tokenizer, source(text), num_windows=2, seq_len=8)
    ids = made.input_ids.flatten().tolist()
    assert made.token_sha256 == hashlib.sha256(struct.pack("<16q", *ids)).hexdigest()


def test_too_little_text_counts_and_says_what_would_do(tokenizer: Any, text: str) -> None:
    found = len(tokenizer(text)["input_ids"])
    with pytest.raises(DataError) as caught:
        token_windows(tokenizer, source(text, "calibrate"), num_windows=64, seq_len=2048)
    assert f"needs 64 x 2048 = 131,072 tokens, found {found:,}" in caught.value.message
    assert f"--num-samples {found // 2048}, or --seq-len {found // 64}" in str(caught.value.hint)
    made = token_windows(tokenizer, source(text, "calibrate"), num_windows=64, seq_len=found // 64)
    assert len(made.input_ids) == 64


@pytest.mark.parametrize("purpose", ["calibrate", "eval"])
def test_too_little_text_names_a_file_by_its_path(tokenizer: Any, purpose: Purpose) -> None:
    short = source("a", purpose, path=Path("notes/a.txt"))

    def one_token(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    with pytest.raises(DataError, match=r"too little text in notes/a\.txt"):
        token_windows(one_token, short, num_windows=2, seq_len=8)


@pytest.mark.parametrize("purpose", ["calibrate", "eval"])
@pytest.mark.parametrize("blank", ["", " \n\n "])
def test_blank_text(tokenizer: Any, purpose: Purpose, blank: str) -> None:
    with pytest.raises(DataError, match="sample holds no text"):
        token_windows(tokenizer, source(blank, purpose), num_windows=1, seq_len=8)


@pytest.mark.parametrize(
    ("num_windows", "seq_len", "words"),
    [(0, 8, "0 windows"), (4, 1, "--seq-len 1"), (None, 8, "needs a number of windows")],
)
def test_numbers_that_make_no_sense(
    tokenizer: Any, num_windows: int | None, seq_len: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        token_windows(
            tokenizer, source("the of", "calibrate"), num_windows=num_windows, seq_len=seq_len
        )


def endless(served: list[int]) -> LazyTexts:
    def read() -> Iterator[str]:
        for number in itertools.count():
            served.append(number)
            yield f"page {number} " + "the of and to in a " * 20

    return LazyTexts(read)


def test_calibration_stops_reading_an_endless_stream(tokenizer: Any) -> None:
    served: list[int] = []
    stream = TextSource("s", None, endless(served), "calibrate", streamed=True)
    made = token_windows(tokenizer, stream, num_windows=4, seq_len=64)
    assert made.input_ids.shape == (4, 64)
    # 4 x 64 tokens, four times over, at five characters a token; a page has 386 or more.
    assert len(served) <= 4 * 64 * 4 * 5 / 386 + 2
    assert made.notes == ()


def test_calibration_reads_on_until_there_are_enough_tokens(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Text whose tokens are longer than supposed: the first reading does not suffice.
    monkeypatch.setattr(windows_module, "_CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(windows_module, "_POOL", 1)
    stream = TextSource("s", None, endless([]), "calibrate", streamed=True)
    made = token_windows(tokenizer, stream, num_windows=4, seq_len=64)
    assert made.input_ids.shape == (4, 64)


def test_evaluation_reads_a_long_text_only_so_far(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "MAX_CHARACTERS", 5_000)
    served: list[int] = []
    stream = TextSource("s", None, endless(served), "eval", streamed=True)
    made = token_windows(tokenizer, stream, num_windows=None, seq_len=64)
    assert len(served) <= 5_000 / 386 + 2
    assert made.notes == ("only the first 5,000 characters of s are read",)


def test_long_text_is_tokenised_without_a_warning(
    tokenizer: Any, text: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(tokenizer, "model_max_length", 100)
    tokenizer(text)
    assert "longer than the specified maximum" in caplog.text
    caplog.clear()
    tokenizer.deprecation_warnings.clear()
    token_windows(tokenizer, source(text), num_windows=None, seq_len=64)
    assert caplog.text == ""
