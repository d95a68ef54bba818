"""Keep libraries from drawing bars and reports over what the caller shows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence its "Loading weights" bar, load reports and warnings; all is restored on exit.

    Bars of downloads stay: they are the only sign of life of the longest step, and whoever wants
    none has ``HF_HUB_DISABLE_PROGRESS_BARS``.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    hook = transformers_logging.set_tqdm_hook(_no_bar)
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with _quiet_logger("huggingface_hub"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence bars and warnings of downloads that take no time; restored on exit."""
    from huggingface_hub import utils

    drawn = not utils.are_progress_bars_disabled()
    if drawn:
        utils.disable_progress_bars()
    try:
        with _quiet_logger("huggingface_hub"):
            yield
    finally:
        if drawn:
            utils.enable_progress_bars()


@contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _no_bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **{**kwargs, "disable": True})
