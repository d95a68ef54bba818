"""``attach``: a stock transformers model runs with a sidecar while the context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Literal

from transformers import PreTrainedModel

from kvq_formats.errors import ConfigError
from kvq_formats.fingerprint import Fingerprint, check
from kvq_formats.sidecar import Sidecar
from kvq_runtime.evaluation_rule import attach_codec
from kvq_runtime.sidecar_codec import SidecarCodec
from kvq_runtime.supported_models import text_config


@contextmanager
def attach(
    model: PreTrainedModel,
    sidecar: Sidecar | str | PathLike[str],
    *,
    rule: Literal["evaluation"],
) -> Iterator[PreTrainedModel]:
    """Run ``model`` with a quantized key/value cache; the stock model is back on exit.

    Args:
        model: a causal language model of transformers, on any device, in any dtype.
        sidecar: what ``calibrate`` returned, or the path of a saved one.
        rule: what a query sees. ``"evaluation"``: every key and value except sinks and each
            query's own recent tokens is decoded; one forward over the whole text, batches may be
            padded.

    Raises:
        FingerprintMismatchError: the sidecar was calibrated for another model.
        KVQError: the model is attached already, or a forward is one that the rule does not cover.
    """
    if rule != "evaluation":
        raise ConfigError(
            f"rule is {rule!r}; this version knows 'evaluation'.", hint='rule="evaluation"'
        )
    if not isinstance(sidecar, Sidecar):
        sidecar = Sidecar.load(sidecar)
    found = Fingerprint.from_config(text_config(model.config))
    check(sidecar.base_model, found)
    with attach_codec(model, SidecarCodec(sidecar)):
        yield model
