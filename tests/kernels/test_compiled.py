"""Decode kernels as they are compiled for sm_80 and sm_90, run by a machine in numpy.

The interpreter and the compiler exclude each other in one process, so each device has its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("device", "order", "chosen", "least"),
    [
        ("sm_90", "forward", "test_fast", 70),
        # The other way round: programs, and warps between barriers, must not depend on it.
        ("sm_80", "backward", "test_fast and (splits or caches or cut or million or shares)", 17),
        ("sm_80", "forward", "test_decode and (jump or 16_bits or share)", 4),
    ],
)
def test_compiled_for(device: str, order: str, chosen: str, least: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST_"))}
    environment |= {"KVQ_TEST_DEVICE": device, "KVQ_TEST_ORDER": order}
    names = ("test_fast_decode.py", "test_fast_outliers.py", "test_decode.py")
    files = [HERE / name for name in names]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        *files,
    ]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None, ran.stdout
    assert int(passed[1]) >= least, ran.stdout
