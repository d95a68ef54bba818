"""Where kernels are tested: in Triton's interpreter, or as ``KVQ_TEST_DEVICE`` says.

``cuda``: on a GPU. ``sm_80``, ``sm_90``: compiled for these, and run by the machine in
``tests/support/ptx_machine``, which needs no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kvq_kernels import decode

WHERE = os.environ.get("KVQ_TEST_DEVICE", "cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if not WHERE.startswith("sm_"):
        yield torch.device(WHERE)
        return
    from ptx_machine.device import emulated

    monkeypatch.setattr(decode, "architecture", lambda device: WHERE)
    with emulated(f"cuda:{WHERE[3:]}", order=os.environ.get("KVQ_TEST_ORDER", "forward")):
        yield torch.device("cpu")
