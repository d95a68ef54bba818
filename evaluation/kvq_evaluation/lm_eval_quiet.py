"""What lm_eval does to a process, kept from lasting: its words, its random numbers, its forks."""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partialmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """No bars, log lines, prints or processes of lm_eval and what it uses; restored after."""
    from tqdm import tqdm

    from kvq_calibration.hub_modes import quiet_hub
    from kvq_runtime.quiet import quiet_transformers

    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(quiet_hub())
        # stdout is for results; lm_eval prints there as it bootstraps, and tasks of it do, too.
        stack.enter_context(redirect_stdout(io.StringIO()))
        for name in ("lm_eval", "evaluate"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.callback(setattr, tqdm, "__init__", tqdm.__init__)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        # It would fork a process that holds a model, and maybe a GPU, for a second's work.
        stack.callback(_set_environment, "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC"))
        _set_environment("DISABLE_MULTIPROC", "1")
        yield


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def tasks_seeded(seed: int, model: PreTrainedModel | None = None) -> Iterator[None]:
    """Seed all the random numbers that tasks draw; their states are back on exit."""
    import numpy

    from kvq_runtime.sampling import seeded

    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        if model is not None:
            stack.enter_context(seeded(model, seed))
        random.seed(seed)
        numpy.random.seed(seed)
        yield
