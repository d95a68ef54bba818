"""The Hugging Face libraries are quiet or offline for a while, and then as they were."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import utils as hub_utils

from kvq_calibration.hub_modes import offline_mode, quiet_hub


def state() -> list[Any]:
    return [
        logging.getLogger("datasets").level,
        logging.getLogger("huggingface_hub").level,
        datasets.are_progress_bars_disabled(),
        hub_utils.are_progress_bars_disabled(),
        datasets.config.STREAMING_OPEN_MAX_RETRIES,
        datasets.config.STREAMING_READ_MAX_RETRIES,
        datasets.config.HF_HUB_OFFLINE,
        constants.HF_HUB_OFFLINE,
    ]


def test_quiet_then_restored(capfd: pytest.CaptureFixture[str]) -> None:
    before = state()
    with quiet_hub():
        logging.getLogger("huggingface_hub.utils").warning("noise")
        logging.getLogger("datasets.load").error("noise")
        for _ in datasets.utils.tqdm(range(3)):
            pass
        assert datasets.config.STREAMING_OPEN_MAX_RETRIES == 3
        assert state() != before
    assert state() == before
    assert capfd.readouterr().err == ""


def test_offline_then_restored() -> None:
    before = state()
    with offline_mode():
        assert huggingface_hub.is_offline_mode()
        with pytest.raises(ConnectionError):
            huggingface_hub.HfApi().dataset_info("o/d")
    assert state() == before


def test_an_error_inside_restores_too() -> None:
    before = state()
    with pytest.raises(KeyError), quiet_hub(), offline_mode():
        raise KeyError
    assert state() == before
