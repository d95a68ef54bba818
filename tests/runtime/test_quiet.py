from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from huggingface_hub import utils
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvq_runtime.quiet import quiet_hub, quiet_transformers


def test_nothing_is_drawn_while_a_model_loads(
    tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with quiet_transformers():
        AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        transformers_logging.get_logger("transformers.anything").warning("loud")
        warnings.warn("loud", stacklevel=1)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_all_is_restored_even_after_an_error() -> None:
    verbosity = transformers_logging.get_verbosity()
    level = logging.getLogger("huggingface_hub").level
    previous = transformers_logging.set_tqdm_hook(None)

    def own_hook(factory: object, args: object, kwargs: object) -> None:
        """Stands for a hook that somebody else has set."""

    transformers_logging.set_tqdm_hook(own_hook)
    try:
        with pytest.raises(KeyError), quiet_transformers():
            raise KeyError
        assert transformers_logging.get_verbosity() == verbosity
        assert logging.getLogger("huggingface_hub").level == level
        assert transformers_logging.set_tqdm_hook(None) is own_hook
    finally:
        transformers_logging.set_tqdm_hook(previous)


def test_bars_of_the_hub_come_back() -> None:
    assert not utils.are_progress_bars_disabled()
    with quiet_hub():
        assert utils.are_progress_bars_disabled()
    assert not utils.are_progress_bars_disabled()


def test_bars_that_were_off_stay_off() -> None:
    utils.disable_progress_bars()
    try:
        with quiet_hub():
            pass
        assert utils.are_progress_bars_disabled()
    finally:
        utils.enable_progress_bars()
