"""``--no-feedback`` and ``--average-bits`` from the command to the file, and in ``kvq inspect``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from command_line import Kvq

SMALL = ("--num-samples", 2, "--seq-len", 64)
FEEDBACK = {
    f"layers.{layer}.{kind}.feedback_{part}"
    for layer in (0, 1)
    for kind in ("key", "value")
    for part in ("order", "gains", "shift")
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "kvq.safetensors")


def test_no_feedback_takes_the_feedback_away(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    given = ("calibrate", tiny_model_dir, "--bits", 2, "--dataset", text_file, *SMALL, "--json")
    for name, flags, feedback in (
        ("default", (), True),
        ("with", ("--feedback",), True),
        ("without", ("--no-feedback",), False),
    ):
        ran = kvq(*given, "-o", name, *flags)
        assert ran.code == 0
        assert ran.json["config"]["feedback"] is feedback
        assert kvq("inspect", name, "--json").json["config"]["feedback"] is feedback
    whole, plain = tensors_of(tmp_path / "default"), tensors_of(tmp_path / "without")
    assert set(whole) - set(plain) == FEEDBACK
    # Ranges are those of the keys, codebooks those of what is rounded.
    for name, tensor in plain.items():
        if name.endswith(("center", "half_range")):
            assert torch.equal(whole[name], tensor)
        elif name.endswith("codebook"):
            assert not torch.equal(whole[name], tensor)
    assert all(torch.equal(t, whole[n]) for n, t in tensors_of(tmp_path / "with").items())
    for name in FEEDBACK:
        assert not name.endswith("gains") or whole[name].abs().max() > 0


def test_without_sensitivity_there_is_nothing_to_feed_back_by(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    ran = kvq(
        "calibrate", tiny_model_dir, "-o", "q", "--sensitivity", "none", "--dataset", text_file,
        *SMALL, "--json",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.json["config"]["feedback"] is False
    assert not FEEDBACK & set(tensors_of(tmp_path / "q"))
    ran = kvq("calibrate", tiny_model_dir, "-o", "p", "--sensitivity", "none", "--feedback", *SMALL)
    assert ran.code == 2
    assert "feedback needs sensitivity 'fisher'" in " ".join(ran.stderr.split())
    assert not (tmp_path / "p").exists()


def test_a_dry_run_says_what_is_planned(
    kvq: Kvq, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("calibrate", tiny_model_dir, "--dry-run")
    planned = kvq(*given, "--json").json
    assert planned["average_bits"] is None
    assert planned["config"]["feedback"] is True
    planned = kvq(*given, "--no-feedback", "--average-bits", 2.75, "--json").json
    assert planned["average_bits"] == 2.75
    assert planned["config"]["feedback"] is False
    assert planned["sidecar"] == f"{tiny_model_dir.name}-kvq2.75"
    shown = kvq(*given, "--average-bits", 2.75).stdout
    assert "2.75 bits on average, chosen layer by layer" in shown
    monkeypatch.setenv("KVQ_FEEDBACK", "0")
    assert kvq(*given, "--json").json["config"]["feedback"] is False
    assert kvq(*given, "--feedback", "--json").json["config"]["feedback"] is True


@pytest.mark.parametrize("feedback", ["--feedback", "--no-feedback"])
@pytest.mark.parametrize("average", [2, 2.5])
def test_widths_that_were_chosen_are_shown(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path, average: float, feedback: str
) -> None:
    ran = kvq(
        "calibrate", tiny_model_dir, "-o", "q", "--average-bits", average, feedback,
        "--outlier-fraction", 0.01, "--dataset", text_file, *SMALL, "--json",
    )  # fmt: skip
    assert ran.code == 0
    widths = {int(layer): tuple(bits) for layer, bits in ran.json["config"]["layer_bits"].items()}
    assert set(widths) == {0, 1}
    every = [bits for pair in widths.values() for bits in pair]
    # Four tensors: 8 or 10 bits, and a bit more of any of them lowers its loss.
    assert sum(every) == 4 * average
    found = kvq("inspect", "q", "--json").json
    assert found["config"] == ran.json["config"]
    assert [(layer["key_bits"], layer["value_bits"]) for layer in found["layers"]] == [
        widths[0],
        widths[1],
    ]
    has_feedback = set(tensors_of(tmp_path / "q")) >= FEEDBACK
    assert has_feedback == (feedback == "--feedback")
    assert tensors_of(tmp_path / "q")["layers.1.value.codebook"].shape == (1 << widths[1][1],)
    rows = [line.split() for line in kvq("inspect", "q").stdout.splitlines()]
    cells = [row[1] for row in rows if row[:1] in (["0"], ["1"])]
    assert cells == [f"{keys}/{values}" for keys, values in (widths[0], widths[1])]
