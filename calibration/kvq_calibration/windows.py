"""Token windows: text cut into rows of equal length for a model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq_calibration.text_source import DATASET_FLAG, TextSource
from kvq_formats.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

# Of a longer text only the beginning is read: six times the length of WikiText-2's test split.
MAX_CHARACTERS = 8 * 2**20
# Of a streamed text calibration reads about this many times the tokens that it needs, so that the
# windows come from different pages and another seed gives other windows.
_POOL = 4
_CHARACTERS_A_TOKEN = 5


@dataclass(frozen=True)
class TokenWindows:
    """Windows of one text.

    ``input_ids`` int64 ``[S, T]``: S windows of T tokens. ``name`` and ``revision`` are the
    source's; ``windows_total`` counts the windows that the text has, S the ones taken;
    ``token_sha256`` is the sha256 of ``input_ids`` as little-endian int64. ``notes`` holds the
    source's notes and those of the cutting.
    """

    input_ids: Tensor
    name: str
    revision: str | None
    token_sha256: str
    windows_total: int
    notes: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether the text has more windows than were taken."""
        return len(self.input_ids) < self.windows_total


def token_windows(
    tokenizer: Any,
    source: TextSource,
    *,
    num_windows: int | None,
    seq_len: int,
    seed: int = 0,
) -> TokenWindows:
    """Tokenise the text once and cut it into windows of ``seq_len`` tokens that do not overlap.

    The tokenizer adds what it adds to any text, such as one begin-of-text token before the first
    window. Tokens after the last full window are left out.

    For evaluation this is the field's perplexity protocol: all windows, or ``num_windows`` of them
    spread evenly over the text (``seed`` has no part in it); a text shorter than one window is one
    shorter window. For calibration ``num_windows`` is required; the windows are spread evenly over
    what is read, from an offset drawn by ``seed``.

    Raises ``DataError`` for too little text, ``ConfigError`` for numbers that make no sense.
    """
    if seq_len < 2:
        raise ConfigError(f"--seq-len {seq_len} is too short; expected 2 or more")
    if num_windows is not None and num_windows < 1:
        raise ConfigError(f"{num_windows} windows were asked for; expected 1 or more")
    calibrate = source.purpose == "calibrate"
    if calibrate and num_windows is None:
        raise ConfigError("calibration needs a number of windows", hint="--num-samples 16")

    needed = num_windows * seq_len if calibrate and num_windows is not None else 2
    ids, notes = _tokenise(tokenizer, source, needed=needed)
    if len(ids) < needed:
        raise _too_little(source, len(ids), num_windows=num_windows, seq_len=seq_len)
    if len(ids) < seq_len:
        notes.append(
            f"{source.label} has {len(ids):,} tokens: one window of that length, not {seq_len:,}"
        )
        seq_len = len(ids)

    windows_total = len(ids) // seq_len
    count = min(num_windows or windows_total, windows_total)
    # Evenly spread: window i of S comes from the i-th of S equal parts of the text.
    offset = random.Random(seed).random() if calibrate else 0.5
    chosen = [int((i + offset) * windows_total / count) for i in range(count)]

    import torch

    rows = [ids[i * seq_len : (i + 1) * seq_len] for i in chosen]
    input_ids = torch.tensor(rows, dtype=torch.int64)
    return TokenWindows(
        input_ids=input_ids,
        name=source.name,
        revision=source.revision,
        token_sha256=hashlib.sha256(input_ids.numpy().astype("<i8").tobytes()).hexdigest(),
        windows_total=windows_total,
        notes=(*source.notes, *notes),
    )


def _tokenise(tokenizer: Any, source: TextSource, *, needed: int) -> tuple[list[int], list[str]]:
    """Token ids of the text, or of as much of it as is called for, and notes."""
    reader = _Reader(source)
    sample = source.streamed and source.purpose == "calibrate"
    wanted = needed * _POOL * _CHARACTERS_A_TOKEN
    characters = wanted if sample else max(MAX_CHARACTERS, wanted)
    while True:
        text, more = reader.beginning(characters)
        if not more and not text.strip():
            flag = DATASET_FLAG[source.purpose]
            raise DataError(f"{source.label} holds no text", hint=f"{flag} builtin")
        # verbose=False: the text is longer than the model's positions on purpose.
        ids = tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
        if not more or len(ids) >= needed:
            break
        characters *= 2
    notes = []
    if more and not sample:
        notes.append(f"only the first {characters:,} characters of {source.label} are read")
    return ids, notes


class _Reader:
    """Reads texts from a source, never more than the longest beginning that was asked for."""

    def __init__(self, source: TextSource) -> None:
        self._texts: Iterator[str] = iter(source.texts)
        self._separator = source.separator
        self._read: list[str] = []
        self._length = 0

    def beginning(self, characters: int) -> tuple[str, bool]:
        """The first ``characters`` of the joined text, and whether there is more."""
        while self._length <= characters:
            text = next(self._texts, None)
            if text is None:
                break
            self._length += len(text) + (len(self._separator) if self._read else 0)
            self._read.append(text)
        joined = self._separator.join(self._read)
        return joined[:characters], len(joined) > characters


def _too_little(
    source: TextSource, found: int, *, num_windows: int | None, seq_len: int
) -> DataError:
    if source.purpose == "eval" or num_windows is None:
        return DataError(
            f"too little text in {source.label}: needs 2 tokens or more, found {found}",
            hint=f"{DATASET_FLAG[source.purpose]} builtin",
        )
    ways = []
    if found >= seq_len:
        ways.append(f"--num-samples {found // seq_len}")
    if found >= 2 * num_windows:
        ways.append(f"--seq-len {found // num_windows}")
    return DataError(
        f"too little text in {source.label}: needs {num_windows} x {seq_len} = "
        f"{num_windows * seq_len:,} tokens, found {found:,}",
        hint=", or ".join([*ways, "a longer text with --dataset"]),
    )
