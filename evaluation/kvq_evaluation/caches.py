"""Measure sidecars and baselines side by side: the same tokens, windows and rule for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from kvq_evaluation.attention_error import attention_errors
from kvq_evaluation.baselines.named import Baseline
from kvq_evaluation.perplexity import UNQUANTIZED, MeasuredPath, evaluate
from kvq_evaluation.report import EvaluationRow
from kvq_evaluation.variants import cache_variants, row_of_variant
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.effective_bits import effective_bits
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.progress import Progress
from kvq_formats.sidecar import Sidecar
from kvq_runtime.evaluation_rule import CacheCodec
from kvq_runtime.sidecar_codec import SidecarCodec
from kvq_runtime.supported_models import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_caches(
    model: PreTrainedModel,
    windows: Tensor | Sequence[Tensor],
    sidecars: Mapping[str, Sidecar],
    baselines: Mapping[str, Baseline] | None = None,
    *,
    dataset: str,
    windows_available: int | None = None,
    path: MeasuredPath | Sequence[MeasuredPath] = "prefill",
    batch_size: int = 1,
    scored: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[EvaluationRow]:
    """Measure sidecars and baselines against the unquantized model, all on the same tokens.

    Args:
        model, windows, batch_size, scored, progress: as for ``perplexity.evaluate``.
        sidecars, baselines: by the name that their row gets.
        dataset: what the windows were cut from.
        windows_available: windows in the text, if not all are given.
        path: ``prefill``, the evaluation rule in one forward a window; ``decode``, the runtime rule
            token by token through the packed cache, where a query reads its own page exactly; or
            both. Baselines have no packed cache and decode in one forward that reads what theirs
            would.

    Returns the unquantized model's row, then for each path one a sidecar and one a baseline. The
    unquantized model runs once a window, whatever is held against it. Raises what ``evaluate``
    raises, FingerprintMismatchError for a sidecar of another model, and ConfigError for a sidecar
    and a baseline of one name.
    """
    held = cache_variants(model, sidecars, baselines, path=path)
    measured = evaluate(
        model,
        windows,
        variants={variant: one.context for variant, one in held.items()},
        path={variant: one.forwards for variant, one in held.items()},
        batch_size=batch_size,
        scored=scored,
        progress=progress,
    )
    baselines = baselines or {}
    rows = row_of_variant(held)
    bits = cache_bits(model, sidecars, baselines, tokens=max(len(window) for window in windows))
    codecs: dict[str, CacheCodec] = {name: SidecarCodec(made) for name, made in sidecars.items()}
    errors = attention_errors(model, windows[0].reshape(1, -1), codecs | dict(baselines))
    return [
        EvaluationRow.from_metrics(
            replace(metrics, name=rows[metrics.name][0]),
            reference=measured[0],
            dataset=dataset,
            effective_bits=bits[rows[metrics.name][0]][0],
            effective_bits_total=bits[rows[metrics.name][0]][1],
            windows_available=windows_available,
            path=rows[metrics.name][1],
            attention_error=errors.get(rows[metrics.name][0]),
        )
        for metrics in measured
    ]


def cache_bits(
    model: PreTrainedModel,
    sidecars: Mapping[str, Sidecar],
    baselines: Mapping[str, Baseline],
    *,
    tokens: int,
) -> dict[str, tuple[float, float]]:
    """Effective bits of every cache, without and with the unfinished page, which baselines lack."""
    of_dtype = float(8 * model.get_input_embeddings().weight.element_size())
    bits = {UNQUANTIZED: (of_dtype, of_dtype)}
    bits |= {name: sidecar_bits(sidecar, tokens=tokens) for name, sidecar in sidecars.items()}
    if baselines:
        shape = Fingerprint.from_config(text_config(model.config))
        for name, codec in baselines.items():
            counted = codec.effective_bits(shape.num_kv_heads, shape.head_dim, tokens=tokens)
            bits[name] = (counted, counted)
    return bits


def decoding_reads_codes(config: KVQConfig, *, tokens: int) -> bool:
    """Whether decoding a window of ``tokens`` tokens reads any page from its codes.

    The last query is that of the token before the last, which is only a label; its own page and the
    recent tokens are exact.
    """
    last_query = tokens - 2
    first_page_end = config.sink_tokens + PAGE_TOKENS - 1
    return first_page_end < last_query - config.recent_tokens


def sidecar_bits(sidecar: Sidecar, *, tokens: int) -> tuple[float, float]:
    """Effective bits of a text of ``tokens`` tokens, without and with its unfinished page."""
    fingerprint = sidecar.base_model.fingerprint
    counted = effective_bits(
        sidecar.config,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        tokens=tokens,
    )
    return counted.without_unfinished, counted.total
