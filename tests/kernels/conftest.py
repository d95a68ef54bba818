"""Where kernels are tested: in Triton's interpreter, or on a GPU with ``KVQ_TEST_DEVICE=cuda``."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("KVQ_TEST_DEVICE", "cpu"))
