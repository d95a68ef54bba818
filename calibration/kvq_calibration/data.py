"""Text to calibrate and to evaluate on: bundled, from the Hub, or from a local file.

``load_text`` says where text comes from, ``token_windows`` makes token windows of it. Calibration
never reads bundled dev or test text, evaluation never reads bundled calibration text.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from kvq_calibration.bundled import builtin_source, bundled_text, stand_in_source
from kvq_calibration.hub_errors import HubUnreachableError
from kvq_calibration.hub_text import HubDataset, hub_text
from kvq_calibration.text_files import text_file
from kvq_calibration.text_source import DATASET_FLAG, Purpose, TextSource
from kvq_calibration.windows import TokenWindows, token_windows
from kvq_formats.errors import ConfigError, DataError

__all__ = [
    "Purpose",
    "TextSource",
    "TokenWindows",
    "bundled_text",
    "load_text",
    "token_windows",
]


@dataclass(frozen=True)
class _Alias:
    """A data set of the Hub that the field knows by a short name, read as the field reads it."""

    repo: str
    config: str
    eval_split: str
    eval_separator: str = "\n\n"
    eval_texts: int | None = None


# The field's perplexity on C4 is that of the first 1,100 pages of the validation split, joined by
# blanks; that of WikiText-2 is that of the whole test split, its lines joined by blank lines.
_ALIASES = {
    "wikitext2": _Alias("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": _Alias("allenai/c4", "en", "validation", eval_separator=" ", eval_texts=1100),
}
_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.+-]+))?")
_FILE_ENDINGS = {
    ".txt", ".jsonl", ".parquet", ".json", ".csv", ".tsv", ".md", ".gz", ".xz", ".zst", ".zip",
    ".arrow", ".pdf", ".html",
}  # fmt: skip


def load_text(
    dataset: str,
    *,
    purpose: Purpose,
    split: str | None = None,
    text_column: str | None = None,
) -> TextSource:
    """Find the text that ``dataset`` names; read little or nothing of it yet.

    ``dataset`` is ``builtin`` (``builtin:dev`` and ``builtin:c4`` for evaluation), ``wikitext2``,
    ``c4``, any Hub id ``name[:config]``, or a local ``.txt``, ``.jsonl`` or ``.parquet`` file.
    ``split`` is for the Hub, ``text_column`` for the Hub, ``.jsonl`` and ``.parquet``. Without
    network bundled text stands in for ``wikitext2`` and ``c4``; ``notes`` of the result say so.

    Raises ``DataError`` for text that is missing, unreadable, empty or out of reach, and
    ``ConfigError`` for options that do not fit the kind of source.
    """
    if dataset == "builtin" or dataset.startswith("builtin:"):
        _refuse(dataset, split=split, text_column=text_column)
        return builtin_source(dataset, purpose=purpose)
    if dataset in _ALIASES:
        return _alias_text(dataset, purpose=purpose, split=split, text_column=text_column)
    match = _HUB_ID.fullmatch(dataset)
    if match is None or _looks_like_a_path(dataset):
        _refuse(dataset, split=split)
        return text_file(Path(dataset).expanduser(), purpose=purpose, text_column=text_column)
    repo, config = match.groups()
    try:
        return hub_text(
            HubDataset(
                repo=repo,
                name=dataset,
                purpose=purpose,
                config=config,
                split=split,
                text_column=text_column,
            )
        )
    except HubUnreachableError as error:
        raise DataError(
            f"{dataset} is not a local file, and as a data set of the Hub it is out of reach: "
            f"{error}",
            hint=_nearest_name(dataset, purpose),
        ) from error


def _alias_text(
    dataset: str, *, purpose: Purpose, split: str | None, text_column: str | None
) -> TextSource:
    alias = _ALIASES[dataset]
    wanted = HubDataset(
        repo=alias.repo,
        name=dataset,
        purpose=purpose,
        config=alias.config,
        split=split or (alias.eval_split if purpose == "eval" else "train"),
        text_column=text_column,
        separator=alias.eval_separator if purpose == "eval" else "\n\n",
        max_texts=alias.eval_texts if purpose == "eval" else None,
    )
    try:
        return hub_text(wanted)
    except HubUnreachableError as error:
        source = stand_in_source(dataset, purpose=purpose, reason=str(error))
        ignored = [
            f"{flag} {value}"
            for flag, value in (("--split", split), ("--text-column", text_column))
            if value is not None
        ]
        if ignored:
            note = f"{' and '.join(ignored)}: no effect on bundled text"
            source = replace(source, notes=(*source.notes, note))
        return source


def _looks_like_a_path(dataset: str) -> bool:
    path = Path(dataset).expanduser()
    return (
        dataset.startswith((".", "~", "/"))
        or dataset.endswith("/")
        or path.suffix.lower() in _FILE_ENDINGS
        # False, not an error, where a folder above may not be read.
        or os.path.exists(path)
    )


def _refuse(dataset: str, *, split: str | None = None, text_column: str | None = None) -> None:
    for flag, value in (("--split", split), ("--text-column", text_column)):
        if value is not None:
            raise ConfigError(
                f"{flag} {value} means nothing for {dataset}", hint=f"leave out {flag}"
            )


def _nearest_name(dataset: str, purpose: Purpose) -> str:
    near = difflib.get_close_matches(dataset.lower(), ("builtin", *_ALIASES), n=1)
    return f"did you mean {near[0]}?" if near else f"{DATASET_FLAG[purpose]} builtin works offline"
