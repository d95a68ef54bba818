"""What ``paper_table.py`` measures: rows, model, text and windows, and how they are recognised."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import paper_protocol as protocol
from paper_protocol import Published, Windows

from kvq_calibration.data import TextSource, load_text
from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError, DataError
from kvq_runtime.models import ResolvedModel, load_tokenizer, resolve_model

UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class Row:
    """One row of the table; ``bits`` is None for the unquantized model."""

    bits: int | None
    outlier_fraction: float = 0.0

    @property
    def name(self) -> str:
        """As ``accuracy.py`` calls it where it has the same."""
        if self.bits is None:
            return UNQUANTIZED
        outliers = f" + {100 * self.outlier_fraction:g} %" if self.outlier_fraction else ""
        return f"{self.bits} bit NUQ{outliers}"

    def config(self, *, sink_tokens: int, qnorm: bool) -> KVQConfig:
        """What its cache is made of."""
        assert self.bits is not None
        return KVQConfig.create(
            key_bits=self.bits,
            value_bits=self.bits,
            outlier_fraction=self.outlier_fraction,
            sink_tokens=sink_tokens,
            recent_tokens=0,
            qnorm=qnorm,
        )


@dataclass(frozen=True)
class Plan:
    """What one run measures, checked before any weights are loaded.

    Fields:
        model: found, its configuration read.
        rows: asked for, in order.
        windows, text: what is evaluated, and where it is from.
        settings: columns that a row must share to count as measured.
        published: the column of the paper that it is held against, if any.
        notes: what the user should know.
    """

    model: ResolvedModel
    rows: tuple[Row, ...]
    windows: Windows
    text: TextSource
    settings: dict[str, object]
    published: Published | None
    notes: tuple[str, ...]

    def identity(self, row: Row) -> dict[str, object]:
        """Columns by which a measured row is recognised."""
        bits = row.bits or UNQUANTIZED_BITS
        return {**self.settings, "bits": bits, "outlier_fraction": row.outlier_fraction}


def wanted_rows(bits: str, outlier_fractions: str) -> tuple[Row, ...]:
    """Rows in the table's order: the widths in the order given, without outliers first."""
    rows = []
    for width in _numbers("--bits", bits, int):
        if width == UNQUANTIZED_BITS:
            rows.append(Row(None))
        elif width in (2, 3, 4):
            fractions = _numbers("--outlier-fraction", outlier_fractions, float)
            rows += [Row(width, fraction) for fraction in fractions]
        else:
            raise ConfigError(f"--bits has {width}, expected 16, 4, 3 or 2.", hint="--bits 16,3")
    # As created, so that a fraction out of range is refused now.
    for row in rows:
        if row.bits is not None:
            row.config(sink_tokens=protocol.SINK_TOKENS, qnorm=True)
    return tuple(dict.fromkeys(rows))


def _numbers(flag: str, given: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        numbers = [kind(part) for part in given.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{flag} is {given!r}, expected numbers with commas between.", hint=f"{flag} 0"
        ) from error
    return numbers


def read_text(dataset: str, *, purpose: Any) -> TextSource:
    """The text; bundled text in place of WikiText-2 only where it is the same text."""
    source = load_text(dataset, purpose=purpose)
    if purpose == "calibrate" and source.name.startswith(f"{dataset} (bundled"):
        raise DataError(
            f"the training split of {dataset} is out of reach, and bundled text is not it: "
            + "; ".join(source.notes),
            hint="--calibration-dataset FILE with that split, or builtin for another protocol",
        )
    return source


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Find model and text, cut the windows, say what deviates from the paper's protocol."""
    rows = wanted_rows(arguments.bits, arguments.outlier_fraction)
    model = resolve_model(arguments.model, revision=arguments.revision)
    positions = model.max_positions
    published = protocol.find_published(
        arguments.published, fingerprint=model.record.fingerprint, positions=positions
    )
    context = arguments.context
    if context is None:
        longest = protocol.LONGEST_DEFAULT_CONTEXT
        context = published.context if published else min(positions or longest, longest)
    if positions is not None and context > positions:
        raise ConfigError(
            f"--context is {context}, but the model has {positions} positions.",
            hint=f"--context {positions}",
        )
    stride = context if arguments.stride is None else arguments.stride
    text = read_text(arguments.dataset, purpose="eval")
    ids = protocol.text_ids(load_tokenizer(model), text)
    windows = protocol.cut_windows(ids, context=context, stride=stride, limit=arguments.limit)
    notes = [*model.notes, *text.notes]
    if published and arguments.published == "auto":
        notes.append(f"{published.name} by its shape: the first row tells whether it is the same")
        changed = _changed(arguments, published, context=context, stride=stride)
        if changed:
            notes.append(f"no published figures beside these: {', '.join(changed)}")
            published = None
    settings: dict[str, object] = {
        "model": model.record.name,
        "revision": model.record.revision or "",
        "load_dtype": arguments.dtype,
        "seq_len": context,
        "stride": stride,
        "sink_tokens": arguments.sink_tokens,
        "qnorm": arguments.qnorm,
        "token_sha256": protocol.sha256_of(windows.input_ids),
        "calibration": arguments.calibration_dataset,
        "num_samples": arguments.num_samples,
        "sample_tokens": arguments.sample_tokens,
        "seed": arguments.seed,
    }
    return Plan(model, rows, windows, text, settings, published, tuple(notes))


def _changed(
    arguments: argparse.Namespace, published: Published, *, context: int, stride: int
) -> list[str]:
    """Options that make published figures another measurement."""
    paper = {
        "context": (context, published.context),
        "stride": (stride, published.context),
        "sink-tokens": (arguments.sink_tokens, protocol.SINK_TOKENS),
        "dataset": (arguments.dataset, protocol.DATASET),
        "calibration-dataset": (arguments.calibration_dataset, protocol.DATASET),
        "num-samples": (arguments.num_samples, protocol.NUM_SAMPLES),
        "sample-tokens": (arguments.sample_tokens, protocol.SAMPLE_TOKENS),
        "limit": (arguments.limit, None),
    }
    return [
        f"--{flag} {used} (the paper: {theirs})"
        for flag, (used, theirs) in paper.items()
        if used != theirs
    ]
