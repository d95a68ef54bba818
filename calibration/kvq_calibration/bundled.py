"""Text that travels inside the package: calibration, dev and test, never one for another.

Each file is compressed and has a line in ``text/SHA256SUMS``; its attribution is in ``NOTICE``.
``scripts/bundle_text.py`` makes them.
"""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources

from kvq_calibration.text_source import DATASET_FLAG, Purpose, TextSource
from kvq_formats.errors import DataError

_REINSTALL = "pip install --force-reinstall --no-deps kvq"

# What `--dataset builtin` and its variants read. Codebooks are fitted on calibration/, choices are
# made on dev/, tables are printed from test/: no name gives one purpose the text of another.
BUILTIN: dict[Purpose, dict[str, tuple[tuple[str, str], ...]]] = {
    "calibrate": {"builtin": (("calibration", "wikipedia"), ("calibration", "c4"))},
    "eval": {
        "builtin": (("test", "wikitext2"),),
        "builtin:c4": (("test", "c4"),),
        "builtin:dev": (("dev", "wikipedia"), ("dev", "c4")),
    },
}

# What stands in for a data set of the Hub that cannot be reached.
STAND_INS: dict[Purpose, dict[str, tuple[str, str]]] = {
    "calibrate": {"wikitext2": ("calibration", "wikipedia"), "c4": ("calibration", "c4")},
    "eval": {"wikitext2": ("test", "wikitext2"), "c4": ("test", "c4")},
}


def bundled_text(folder: str, name: str) -> str:
    """One bundled text, for example ``bundled_text("calibration", "wikipedia")``.

    Raises ``DataError`` when the file is missing or its bytes are not the ones that were shipped.
    """
    label = f"{folder}/{name}.txt"
    root = resources.files("kvq_calibration") / "text"
    try:
        sums = (root / "SHA256SUMS").read_text(encoding="utf-8")
        compressed = (root / folder / f"{name}.txt.xz").read_bytes()
    except OSError as error:
        raise DataError(
            f"the bundled text {label} cannot be read: {error}", hint=_REINSTALL
        ) from error
    expected = {path: digest for digest, path in (line.split() for line in sums.splitlines())}
    try:
        content = lzma.decompress(compressed)
    except lzma.LZMAError as error:
        raise DataError(f"the bundled text {label} is damaged: {error}", hint=_REINSTALL) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected.get(label):
        raise DataError(
            f"the bundled text {label} is damaged: its sha256 is {found}, "
            f"expected {expected.get(label, 'an entry in SHA256SUMS')}",
            hint=_REINSTALL,
        )
    return content.decode("utf-8")


def builtin_source(dataset: str, *, purpose: Purpose) -> TextSource:
    """The text of ``builtin`` or ``builtin:NAME``; its revision is the sha256 of the text.

    Raises ``DataError`` for a name that does not exist or is kept for the other purpose.
    """
    names = BUILTIN[purpose]
    if dataset not in names:
        kept = any(dataset in others for others in BUILTIN.values())
        what = f"{dataset!r} is kept for evaluation" if kept else f"there is no text {dataset!r}"
        raise DataError(
            f"{what}; bundled text for {purpose}: {', '.join(names)}",
            hint=f"{DATASET_FLAG[purpose]} builtin",
        )
    texts = [bundled_text(folder, name) for folder, name in names[dataset]]
    return _source(dataset, texts, purpose=purpose, notes=())


def stand_in_source(dataset: str, *, purpose: Purpose, reason: str) -> TextSource:
    """Bundled text in place of ``wikitext2`` or ``c4``, with a note that says so."""
    folder, name = STAND_INS[purpose][dataset]
    note = f"offline ({reason}): bundled text {folder}/{name} stands in for {dataset}"
    texts = [bundled_text(folder, name)]
    return _source(f"{dataset} (bundled {folder}/{name})", texts, purpose=purpose, notes=(note,))


def _source(name: str, texts: list[str], *, purpose: Purpose, notes: tuple[str, ...]) -> TextSource:
    digest = hashlib.sha256("\n\n".join(texts).encode("utf-8")).hexdigest()
    return TextSource(
        name=name, revision=f"sha256:{digest}", texts=texts, purpose=purpose, notes=notes
    )
