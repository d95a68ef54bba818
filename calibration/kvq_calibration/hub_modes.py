"""Settings of the Hugging Face libraries that hold for a while: quiet, and offline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

# Of the libraries' 20 retries, each after 5 seconds.
_STREAM_RETRIES = 3


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No progress bars, log lines or long retries of the Hugging Face libraries; restored after."""
    import datasets
    from huggingface_hub import utils as hub_utils

    with ExitStack() as stack:
        for name in ("datasets", "huggingface_hub"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if not hub_utils.are_progress_bars_disabled():
            stack.callback(hub_utils.enable_progress_bars)
            hub_utils.disable_progress_bars()
        for name in ("STREAMING_OPEN_MAX_RETRIES", "STREAMING_READ_MAX_RETRIES"):
            _set(stack, datasets.config, name, _STREAM_RETRIES)
        yield


@contextmanager
def offline_mode() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, for a while: the libraries look at their caches only."""
    import datasets
    from huggingface_hub import constants

    with ExitStack() as stack:
        _set(stack, datasets.config, "HF_HUB_OFFLINE", True)
        _set(stack, constants, "HF_HUB_OFFLINE", True)
        yield


def _set(stack: ExitStack, module: ModuleType, name: str, value: object) -> None:
    # An older or newer release may not have the setting: then there is nothing to quieten.
    if hasattr(module, name):
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
