"""``attach``: a stock transformers model runs with a sidecar while the context is open."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Literal, get_args

from transformers import PreTrainedModel

from kvq_formats.errors import ConfigError
from kvq_formats.fingerprint import Fingerprint, check
from kvq_formats.sidecar import Sidecar
from kvq_runtime.evaluation_rule import attach_codec
from kvq_runtime.implementation import choose_implementation
from kvq_runtime.offload import input_device
from kvq_runtime.page_codec import check_kernels, page_codecs
from kvq_runtime.runtime_rule import attach_pages
from kvq_runtime.sidecar_codec import SidecarCodec
from kvq_runtime.supported_models import text_config

logger = logging.getLogger(__name__)

AttachRule = Literal["runtime", "evaluation", "exact-prefill"]


def attach(
    model: PreTrainedModel,
    sidecar: Sidecar | str | os.PathLike[str],
    *,
    rule: AttachRule = "runtime",
    impl: Literal["reference", "triton"] | None = None,
) -> AbstractContextManager[PreTrainedModel]:
    """Run ``model`` with a quantized key/value cache; the stock model is back on exit.

    What is returned may be entered again once it has been left, not before. Under the other rules
    than ``"evaluation"`` no gradient passes through attention.

    Args:
        model: a causal language model of transformers, on any device, in any dtype.
        sidecar: what ``calibrate`` returned, or the path of a saved one.
        rule: what a query sees. ``"runtime"``: complete pages from their codes, its own page, sinks
            and recent tokens exactly, however the text is fed; serves ``model.generate`` and plain
            forwards, on a packed cache that is made where none is passed. ``"exact-prefill"``: the
            same, but tokens of one forward read each other exactly, as in KVQuant and transformers.
            ``"evaluation"``: every key and value except sinks and each query's own recent tokens is
            decoded; one forward over the whole text.
        impl: of attention over packed pages; None chooses by the device.

    Raises:
        FingerprintMismatchError: the sidecar was calibrated for another model.
        KVQError: the model is attached already, ``impl`` cannot run here, or a forward is one that
            the rule does not cover.
    """
    if rule not in get_args(AttachRule):
        names = ", ".join(repr(name) for name in get_args(AttachRule))
        raise ConfigError(f"rule is {rule!r}, expected one of {names}.", hint='rule="runtime"')
    return _Attachment(model, fitting_sidecar(model, sidecar), rule, impl)


class _Attachment(AbstractContextManager[PreTrainedModel]):
    """Enters ``_attached`` anew each time; it refuses a model that is attached already."""

    def __init__(
        self, model: PreTrainedModel, sidecar: Sidecar, rule: AttachRule, impl: str | None
    ) -> None:
        self._arguments = (model, sidecar, rule, impl)

    def __enter__(self) -> PreTrainedModel:
        entered = _attached(*self._arguments)
        model = entered.__enter__()
        # Only now: a refused entry must leave the one that is open to be closed.
        self._entered = entered
        return model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._entered.__exit__(kind, error, traceback)


@contextmanager
def _attached(
    model: PreTrainedModel, sidecar: Sidecar, rule: AttachRule, impl: str | None
) -> Iterator[PreTrainedModel]:
    if rule == "evaluation":
        # Attention is the model's own; a request that cannot be met is refused all the same.
        choose_implementation(input_device(model), impl or "reference")
        with attach_codec(model, SidecarCodec(sidecar)):
            yield model
        return
    chosen = choose_implementation(input_device(model), impl)
    logger.info("attention over packed pages: %s (%s)", chosen.name, chosen.reason)
    codecs = page_codecs(model, sidecar)
    if chosen.name == "triton":
        check_kernels(codecs, Fingerprint.from_config(text_config(model.config)))
    with attach_pages(model, codecs, rule=rule, impl=chosen.name):
        yield model


def fitting_sidecar(model: PreTrainedModel, sidecar: Sidecar | str | os.PathLike[str]) -> Sidecar:
    """Load a sidecar where it is a path, and check that it was made for ``model``.

    Raises SidecarError, FingerprintMismatchError.
    """
    if not isinstance(sidecar, Sidecar):
        sidecar = Sidecar.load(sidecar)
    check(sidecar.base_model, Fingerprint.from_config(text_config(model.config)))
    return sidecar
