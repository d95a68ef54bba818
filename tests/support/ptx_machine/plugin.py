"""Tests of kernels on the machine instead of in Triton's interpreter: a plugin of pytest's.

    KVQ_PTX_TARGET=cuda:90 KVQ_PTX_ORDER=backward PYTHONPATH=tests/support \\
        pytest -p ptx_machine.plugin --noconftest tests/kernels/test_decode.py

Without conftest.py, which asks for the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from ptx_machine.device import Emulation, emulated
from ptx_machine.machine import Order


@pytest.fixture
def target() -> str:
    return os.environ["KVQ_PTX_TARGET"]


@pytest.fixture(autouse=True)
def emulation(target: str) -> Iterator[Emulation]:
    """Every launch runs on the machine."""
    order = cast(Order, os.environ.get("KVQ_PTX_ORDER", "forward"))
    with emulated(target, order) as running:
        yield running


@pytest.fixture
def device() -> Any:
    """Where tests of kernels put their tensors."""
    return torch.device("cpu")
