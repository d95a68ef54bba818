"""Text of the Hugging Face Hub, streamed: only what is used is downloaded.

The Hub is asked once, quickly, for the data set's commit before anything else happens, so that a
machine without a network learns it in seconds; ``datasets`` alone would retry for half a minute.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvq_calibration.hub_errors import HubUnreachableError, hub_errors
from kvq_calibration.hub_modes import offline_mode, quiet_hub
from kvq_calibration.text_source import LazyTexts, Purpose, TextSource, choose_text_column
from kvq_formats.errors import DataError

# The first answer of the Hub must come within this time; later reads may take longer.
_PROBE_SECONDS = 5.0
_ROWS_A_READ = 64
_PREFERRED_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "calibrate": ("train",),
    "eval": ("test", "validation"),
}


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """Which text of the Hub is wanted.

    ``name`` is what people call it. ``split`` None means train for calibration and test, else
    validation, for evaluation; ``text_column`` None means ``text`` or the only column of strings.
    The text is the first ``max_texts`` rows (None: all) joined by ``separator``.
    """

    repo: str
    name: str
    purpose: Purpose
    config: str | None = None
    split: str | None = None
    text_column: str | None = None
    separator: str = "\n\n"
    max_texts: int | None = None


def hub_text(wanted: HubDataset) -> TextSource:
    """The text of one split, pinned to the data set's present commit.

    When the Hub does not answer, a copy in the Hugging Face cache is used if there is one. Raises
    ``HubUnreachableError`` without network and copy, ``DataError`` when the data set does not
    exist, is gated, or cannot be read.
    """
    try:
        with hub_errors(wanted.repo):
            revision, splits = _open_streamed(wanted)
            return _source(wanted, splits, revision=revision, notes=())
    except HubUnreachableError as unreachable:
        cached = _open_cached(wanted)
        if cached is None:
            raise
        copy = f"the copy of {wanted.repo} in the Hugging Face cache is used"
        with hub_errors(wanted.repo):
            return _source(
                wanted, cached, revision=None, notes=(f"offline ({unreachable}): {copy}",)
            )


def _open_streamed(wanted: HubDataset) -> tuple[str | None, Mapping[str, Any]]:
    """The commit and the splits, nothing read yet."""
    from huggingface_hub import HfApi

    # One request without retries: this is where a machine without network stops.
    revision = HfApi().dataset_info(wanted.repo, expand=["sha"], timeout=_PROBE_SECONDS).sha
    import datasets

    with quiet_hub():
        splits = datasets.load_dataset(
            wanted.repo, name=wanted.config, revision=revision, streaming=True
        )
    return revision, splits


def _open_cached(wanted: HubDataset) -> Mapping[str, Any] | None:
    """The splits of the copy in the Hugging Face cache; None if there is none."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with quiet_hub(), offline_mode():
            return datasets.load_dataset(wanted.repo, name=wanted.config)
    except (OSError, ValueError, DatasetsError):
        return None


def _source(
    wanted: HubDataset,
    splits: Mapping[str, Any],
    *,
    revision: str | None,
    notes: tuple[str, ...],
) -> TextSource:
    split = _choose_split(wanted, list(splits))
    rows = splits[split]
    # The first row is read here: a gated file, a broken one or a blocked download server is met
    # before any model is loaded.
    with quiet_hub():
        first = next(iter(rows), None)
    if first is None:
        raise DataError(
            f"split {split!r} of {wanted.repo} has no rows", hint="--split names another one"
        )
    column = choose_text_column(
        {name: isinstance(value, str) for name, value in first.items()},
        text_column=wanted.text_column,
        source_name=wanted.repo,
    )

    def read() -> Iterator[str]:
        iterator = itertools.islice(iter(rows), wanted.max_texts)
        while True:
            with hub_errors(wanted.repo, reading=True), quiet_hub():
                batch = list(itertools.islice(iterator, _ROWS_A_READ))
            if not batch:
                return
            for row in batch:
                yield row[column] or ""

    if wanted.purpose == "calibrate" and split in _PREFERRED_SPLITS["eval"]:
        warning = f"calibrating on split {split!r} of {wanted.repo}: do not evaluate on that split"
        notes = (*notes, warning)
    return TextSource(
        name=wanted.name,
        revision=revision,
        texts=LazyTexts(read),
        purpose=wanted.purpose,
        separator=wanted.separator,
        streamed=True,
        notes=notes,
    )


def _choose_split(wanted: HubDataset, names: list[str]) -> str:
    preferred = (wanted.split,) if wanted.split else _PREFERRED_SPLITS[wanted.purpose]
    for name in preferred:
        if name in names:
            return name
    raise DataError(
        f"{wanted.repo} has no split named {' or '.join(preferred)}; "
        f"its splits: {', '.join(names) or 'none'}",
        hint=f"--split {names[0]}" if names else None,
    )
