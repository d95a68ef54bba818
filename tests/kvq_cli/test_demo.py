from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Kvq
from kvq_cli.commands import demo
from kvq_cli.output import Output
from kvq_cli.session import recall, remember
from kvq_formats.sidecar import Sidecar


@pytest.fixture(autouse=True)
def a_smaller_subset(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NUM_SAMPLES", 2)
    monkeypatch.setattr(demo, "SEQ_LEN", 64)
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 300)
    monkeypatch.setattr(demo, "NEW_TOKENS", 3)


def test_demo_ends_with_tables_and_leaves_nothing(
    kvq: Kvq, tmp_path: Path, sidecar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    remember(sidecar, Output())
    ran = kvq("demo")
    assert ran.code == 0
    assert "kvq/tiny-llama" in ran.stdout
    assert "partial: 2 windows" in ran.stdout
    assert ran.stdout.count("unquantized") == 2
    # The last thing is text, with a table of what its cache held.
    generated = ran.stdout[ran.stdout.index("300 tokens of WikiText-2 test (bundled), continued") :]
    table = generated[generated.index("Held when the text was complete") :]
    assert "tiny-llama-kvq3" in table
    assert " 302 " in table
    assert "16.00" in table
    assert ran.stderr.splitlines()[-1].startswith("Next: kvq calibrate ")
    assert list(tmp_path.iterdir()) == []
    # The user's own sidecar stays the current one.
    assert recall() == sidecar


def test_demo_keeps_its_sidecar_if_asked(kvq: Kvq, tmp_path: Path) -> None:
    ran = kvq("demo", "--bits", 2, "-o", tmp_path / "q", "--json")
    assert ran.code == 0
    assert ran.json["schema"] == "kvq.demo/1"
    assert ran.json["calibration"]["config"]["key_bits"] == 2
    assert [len(text["rows"]) for text in ran.json["texts"]] == [2, 2]
    generation = ran.json["generation"]
    assert (generation["prompt_tokens"], generation["generated_tokens"]) == (300, 3)
    assert generation["tokens_held"] == 302
    held, unpacked = generation["held_bytes"], generation["bf16_bytes"]
    assert generation["effective_bits"] == pytest.approx(16 * held / unpacked, abs=5e-5)
    assert generation["kl"] > 0
    assert 0 < generation["agreement"] <= 1
    assert Sidecar.load(tmp_path / "q").base_model.id == "kvq/tiny-llama"
    assert recall() is None
    assert kvq("demo", "-o", tmp_path / "q", "--json").code == 1


@pytest.mark.parametrize(
    # In the middle of the work, and between the files of a save.
    "function",
    ["kvq_calibration.pipeline.measure_points", "os.fsync"],
)
@pytest.mark.parametrize("arguments", [(), ("-o", "q/demo")])
def test_a_terminated_demo_leaves_nothing(
    arguments: tuple[str, ...], function: str, tmp_path: Path
) -> None:
    """The signal comes twice, as from those who lose patience."""
    script = (
        f"import os, signal, sys, {function.rpartition('.')[0]}\n"
        "from kvq_cli.app import main\n"
        "from kvq_cli.commands import demo\n"
        "demo.NUM_SAMPLES, demo.SEQ_LEN = 1, 64\n"
        "def killed(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"{function} = killed\n"
        "main(['demo', '--no-progress', *sys.argv[1:]])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (128 + signal.SIGTERM, "")
    assert ran.stderr == "Error: terminated; nothing half-written is left behind.\n"
    assert list(tmp_path.iterdir()) == []
