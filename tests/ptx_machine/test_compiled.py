"""Kernels, compiled for devices that are not here, on the machine.

The interpreter and the compiler exclude each other in one process: the cases run in another one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("compiled_cases.py")
SUPPORT = CASES.parents[1] / "support"


@pytest.mark.skipif(
    not version("triton").startswith("3.7"), reason="another compiler makes other instructions"
)
@pytest.mark.parametrize(("target", "order"), [("cuda:80", "backward"), ("cuda:90", "forward")])
def test_compiled_kernels_compute_what_they_should(target: str, order: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"KVQ_PTX_TARGET": target, "KVQ_PTX_ORDER": order, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), environment.get("PYTHONPATH", "")])
    # Without conftest.py, which asks for the interpreter.
    command = ["-m", "pytest", "-p", "ptx_machine.plugin", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest"]  # takes a second to load
    ran = subprocess.run(
        [sys.executable, *command, CASES], env=environment, capture_output=True, text=True,
        check=False, cwd=CASES.parents[2],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def test_launches_are_not_emulated_where_kernels_are_interpreted() -> None:
    from ptx_machine.device import emulated

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), emulated():
        pass
