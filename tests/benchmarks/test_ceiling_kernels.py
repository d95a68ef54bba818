"""The parts of the fast path that are timed alone do what they say: run as they are compiled.

Gluon is not interpreted: where tests are (``KVQ_TEST_DEVICE`` unset), the first test runs this file
once more, in a process that compiles and has a machine for PTX.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ceiling_reference import Expected

WHERE = os.environ.get("KVQ_TEST_DEVICE", "cpu")
compiled = pytest.mark.skipif(WHERE == "cpu", reason="test_compiled_for runs this")


@pytest.mark.skipif(WHERE != "cpu", reason="this is that process")
def test_compiled_for() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST_"))}
    environment |= {"KVQ_TEST_DEVICE": "sm_90", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None, ran.stdout
    assert int(passed[1]) == 4, ran.stdout


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if not WHERE.startswith("sm_"):
        yield torch.device(WHERE)
        return
    from kvq_kernels import decode
    from ptx_machine.device import emulated

    monkeypatch.setattr(decode, "architecture", lambda device: WHERE)
    with emulated(f"cuda:{WHERE[3:]}"):
        yield torch.device("cpu")


@compiled
@pytest.mark.parametrize(("bits", "G", "D"), [(2, 1, 64), (3, 4, 128), (4, 3, 64)])
def test_every_part(bits: int, G: int, D: int, device: torch.device) -> None:
    """Rows of 3, 1 and no pages, of which the second leaves a program without any."""
    found, known = left_by_parts(bits, G, D, device)
    assert known.unpack.unique().numel() > 4
    assert torch.equal(found["unpack"], known.unpack)
    assert torch.equal(found["values"].double(), known.values)
    assert known.values.amax() > 0
    # No number is rounded in this case: a score that is missing would be seen.
    excess = (found["keys"].double() - known.keys).abs() - known.key_sums
    assert excess.max() <= 0
    assert (known.keys.abs() > 100 * known.key_sums).any()
    for part in (known.unpack, known.keys, known.values):
        assert not part[1, :, 1].any()
        assert not part[2].any()


@compiled
def test_parts_look_up_and_load_what_the_whole_does() -> None:
    """Counted in their code: a part that the compiler had emptied would be no ceiling."""
    from decode_ceilings import measure_stage
    from kernel_code import Target

    bits = 2
    rows = {
        stage: measure_stage(stage, bits, Target.CUDA_90)
        for stage in ("unpack", "keys", "values", "all")
    }
    lookups, loads = ({s: float(str(r[n])) for s, r in rows.items()} for n in ("lookups", "loads"))
    assert lookups["unpack"] == pytest.approx(lookups["all"], rel=0.02)
    assert lookups["keys"] + lookups["values"] == pytest.approx(lookups["all"], rel=0.02)
    assert loads["keys"] + loads["values"] == pytest.approx(loads["all"], rel=0.1)
    # i32 of a page's keys and of its values for each number, four and two in a load.
    words = bits / 32
    assert loads["unpack"] > words / 2 * (1 / 4 + 1 / 2)
    for row in rows.values():
        assert row["tensor"] == 0 if row["stage"] == "unpack" else float(str(row["tensor"])) > 0


def left_by_parts(
    bits: int, G: int, D: int, device: torch.device
) -> tuple[dict[str, Tensor], Expected]:
    import gpu_ceilings
    from ceiling_reference import expected
    from gpu_paths import launch_of

    from kvq_kernels.attention import AttentionOptions
    from kvq_kernels.decode import decode
    from kvq_kernels.kernel_tables import KernelTables
    from kvq_kernels.phases import Phases
    from packed_cases import make_case, on_device

    case = make_case(tokens=(800, 300, 100), key_bits=bits, value_bits=bits, G=G, D=D, H=2,
                     outlier_fraction=0.0)  # fmt: skip
    tables = KernelTables.of(case.parameters, case.config, device=device)
    phases = Phases.of(case.angles, device=device)
    rows, query = on_device(case.rows, device), case.query.to(device)
    how: dict[str, Any] = {"options": AttentionOptions(scaling=case.scaling), "splits": 2}
    launched = launch_of(lambda: decode(query, rows, tables, phases, **how))
    assert launched is not None
    found = {}
    for name in gpu_ceilings.PARTS:
        call, folded = gpu_ceilings.part_call(name, launched)
        folded.fill_(-1)
        call()
        found[name] = folded
    return found, expected(launched, tables)
