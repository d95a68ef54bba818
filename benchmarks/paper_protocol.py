"""How the paper's Table 18 is measured, and what it says: windows, samples, published figures.

KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079) evaluates as GPTQ does. Where kvq agrees:

- Text: the raw WikiText-2 test split, all its rows joined by blank lines, tokenised once; the
  tokenizer adds what it adds to any text, so that only the first window begins with begin-of-text.
  ``kvq eval --ppl wikitext2`` reads the same, and so does the bundled copy of that split which
  stands in for it offline.
- Windows: consecutive, of the model's own context, the stride as long as the context. Tokens after
  the last full window are left out. ``kvq eval --seq-len CONTEXT`` cuts the same windows.
- Score: each window predicts all its tokens but the first. GPTQ averages the mean losses of the
  windows, kvq divides the sum of all losses by their number; with windows of one length both are
  one number.
- Cache: every key and value of the window is quantized but the sink (one token a window), whatever
  the distance to its query: the evaluation rule with ``recent_tokens=0``.
- Calibration: 16 samples of 2,048 tokens of the training split, drawn as GPTQ's loader draws them
  (``random.seed(0)``, ``randint`` over the whole tokenised split; samples may overlap). ``kvq
  calibrate`` takes other windows: spread over the beginning of the split.

Where kvq differs from the paper or its public code:

- Tokenizer: transformers' default (fast) one; GPTQ's loader asks for the slow one.
- Losses: summed in f32 and f64 from the model's logits; the public code takes them in fp16.
- Context: the paper says each model's own. The public code takes ``--seqlen`` and gives no value
  but LLaMA's 2,048. Llama-2 is taken at 4,096 and Llama-3 at 8,192, their positions, and Mistral at
  8,192, as the paper does, while its configuration says 32,768.
- Sink: Table 18 keeps one token; the public code keeps none unless ``--first_few_fp16 1`` is given.
- Q-Norm: the final paper has none; kvq's default is on, and ``--no-qnorm`` switches it off.
- Outliers: the paper caps nothing in this table; kvq's pools have a fixed capacity, which the
  effective bits count. Sensitivity weights are ``F * half_range**2`` (the paper's Eq. 7), which the
  public code leaves out.
- Mistral-7B-v0.1 has a window of 4,096 tokens in every layer. The evaluation rule quantizes all of
  its keys and values and leaves the window to the model. Whether the paper's figures have that
  window is not said; the first row tells.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvq_calibration.data import TextSource
from kvq_formats.errors import ConfigError, DataError
from kvq_formats.fingerprint import Fingerprint

SOURCE = "KVQuant, NeurIPS 2024 (arXiv 2401.18079), Table 18"
DATASET = "wikitext2"
SINK_TOKENS = 1
NUM_SAMPLES = 16
SAMPLE_TOKENS = 2048
SEED = 0
LONGEST_DEFAULT_CONTEXT = 8192
"""Of models that are not in the table; the longest that the table has."""

Cell = tuple[int | None, float]
"""Bits (None: unquantized) and outlier fraction."""


@dataclass(frozen=True)
class Published:
    """A column of the table.

    Fields:
        name: as the paper writes it.
        context: tokens a window.
        positions: of the model's configuration.
        shape: what its fingerprint says.
        rope_theta: of its rotation.
        perplexity: published figures by cell. 4 bits without outliers are not among those that we
            hold.
    """

    name: str
    context: int
    positions: int
    shape: Mapping[str, object]
    rope_theta: float
    perplexity: Mapping[Cell, float]

    def is_of(self, fingerprint: Fingerprint, positions: int | None) -> bool:
        """Whether a model has this one's shape; weights trained further have it, too."""
        rope = fingerprint.rope
        return (
            all(getattr(fingerprint, name) == value for name, value in self.shape.items())
            and positions == self.positions
            and rope.get("rope_type") == "default"
            and rope.get("rope_theta") == self.rope_theta
        )


def _shape(model_type: str, num_kv_heads: int, vocab_size: int) -> dict[str, object]:
    return {
        "model_type": model_type,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_kv_heads": num_kv_heads,
        "vocab_size": vocab_size,
    }


def _figures(*perplexities: float) -> dict[Cell, float]:
    cells: tuple[Cell, ...] = ((None, 0), (4, 0.01), (3, 0), (3, 0.01), (2, 0), (2, 0.01))
    return dict(zip(cells, perplexities, strict=True))


PUBLISHED = (
    Published(
        "LLaMA-7B", 2048, 2048, _shape("llama", 32, 32_000), 1e4,
        _figures(5.68, 5.69, 5.87, 5.75, 7.23, 6.01),
    ),
    Published(
        "Llama-2-7B", 4096, 4096, _shape("llama", 32, 32_000), 1e4,
        _figures(5.12, 5.13, 5.34, 5.17, 7.03, 5.41),
    ),
    Published(
        "Llama-3-8B", 8192, 8192, _shape("llama", 8, 128_256), 5e5,
        _figures(5.54, 5.56, 5.84, 5.64, 7.04, 6.04),
    ),
    Published(
        "Mistral-7B", 8192, 32_768, _shape("mistral", 8, 32_000), 1e4,
        _figures(4.76, 4.78, 4.98, 4.82, 6.84, 5.14),
    ),
)  # fmt: skip


def find_published(
    wanted: str, *, fingerprint: Fingerprint, positions: int | None
) -> Published | None:
    """The column of a model: ``auto`` by its shape, else by its name; ``none`` for no column.

    Raises ConfigError for a name that the table does not have.
    """
    if wanted == "none":
        return None
    if wanted == "auto":
        return next((it for it in PUBLISHED if it.is_of(fingerprint, positions)), None)
    for published in PUBLISHED:
        if published.name.lower() == wanted.lower():
            return published
    raise ConfigError(
        f"--published is {wanted!r}, expected auto, none or a column of the table.",
        hint=f"--published {PUBLISHED[0].name}; all: {', '.join(it.name for it in PUBLISHED)}",
    )


def text_ids(tokenizer: Any, source: TextSource) -> list[int]:
    """Token ids of a whole text, tokenised once."""
    text = source.separator.join(source.texts)
    # verbose=False: the text is longer than the model's positions on purpose.
    ids: list[int] = tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
    return ids


@dataclass(frozen=True)
class Windows:
    """What is evaluated.

    Fields:
        input_ids: int64 ``[S, T]``.
        scored: of each window, how many of its last tokens count.
        available: windows in the text.
    """

    input_ids: Tensor
    scored: tuple[int, ...]
    available: int


def cut_windows(
    ids: Sequence[int], *, context: int, stride: int, limit: int | None = None
) -> Windows:
    """Windows of ``context`` tokens, each ``stride`` tokens after the one before.

    A stride as long as the context is the paper's protocol. With a shorter one a window counts the
    tokens that the one before did not have, so that each token counts once and has at least
    ``context - stride`` tokens before it. ``limit`` takes that many, evenly spread.

    Raises ConfigError for numbers that make no sense, DataError for a text of less than a window.
    """
    if context < 2:
        raise ConfigError(f"--context is {context}, expected 2 tokens or more.")
    if not 1 <= stride <= context:
        raise ConfigError(
            f"--stride is {stride}, expected 1 to {context}, the context: beyond it tokens are "
            "left out between windows.",
            hint=f"--stride {context}, as in the paper",
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}, expected 1 window or more.")
    starts = range(0, len(ids) - context + 1, stride)
    if not starts:
        raise DataError(
            f"the text has {len(ids):,} tokens, less than one window of {context:,}.",
            hint="a longer text with --dataset, or a shorter --context",
        )
    count = min(limit or len(starts), len(starts))
    chosen = [starts[(2 * i + 1) * len(starts) // (2 * count)] for i in range(count)]
    return Windows(
        input_ids=torch.tensor([ids[i : i + context] for i in chosen], dtype=torch.int64),
        # The first window has no one before it, and no window predicts its first token.
        scored=tuple(min(stride, context - 1) if start else context - 1 for start in chosen),
        available=len(starts),
    )


def draw_samples(ids: Sequence[int], *, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Calibration samples int64 ``[num_samples, seq_len]``, as GPTQ's loader draws them.

    Raises ConfigError for numbers that make no sense, DataError for too little text.
    """
    if num_samples < 1 or seq_len < 2:
        raise ConfigError(
            f"{num_samples} samples of {seq_len} tokens, expected at least one of 2.",
            hint=f"--num-samples {NUM_SAMPLES} --sample-tokens {SAMPLE_TOKENS}",
        )
    if len(ids) <= seq_len:
        raise DataError(
            f"the calibration text has {len(ids):,} tokens, expected more than {seq_len:,}.",
            hint="a longer text with --calibration-dataset, or a shorter --sample-tokens",
        )
    source = random.Random(seed)
    starts = [source.randint(0, len(ids) - seq_len - 1) for _ in range(num_samples)]
    return torch.tensor([ids[start : start + seq_len] for start in starts], dtype=torch.int64)


def sha256_of(input_ids: Tensor) -> str:
    """Of token ids as little-endian int64, as sidecars record it."""
    return hashlib.sha256(input_ids.numpy().astype("<i8").tobytes()).hexdigest()
