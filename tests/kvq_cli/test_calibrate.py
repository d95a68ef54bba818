from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvq_calibration.pipeline
from command_line import Kvq, Ran
from kvq_cli.session import recall
from kvq_formats.sidecar import Sidecar

SMALL = ("--num-samples", 2, "--seq-len", 128)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def error_of(ran: Ran) -> str:
    return str(ran.json["error"]["message"])


def test_calibrate_writes_a_sidecar_and_names_the_next_command(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    ran = kvq("calibrate", tiny_model_dir, "--bits", 3, "--dataset", text_file, *SMALL)
    assert ran.code == 0
    written = tmp_path / f"{tiny_model_dir.name}-kvq3"
    made = Sidecar.load(written)
    assert (made.config.key_bits, made.config.value_bits) == (3, 3)
    assert made.calibration.num_samples == 2
    assert made.calibration.seq_len == 128
    assert ran.stdout.splitlines()[0].split() == ["sidecar", written.name]
    for what in ("effective bits", "codes", "scales", "outliers", "time", "peak memory"):
        assert what in ran.stdout
    assert ran.stderr.splitlines()[-1] == (
        f"Next: kvq eval {tiny_model_dir} --sidecar {written.name}"
    )
    assert recall() == written


def test_json_has_everything(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    ran = kvq(
        "calibrate", tiny_model_dir, "-o", "a/q", "--key-bits", 2, "--value-bits", 3, "--json",
        "--outlier-fraction", 0, "--sensitivity", "none", "--kmeans", "sklearn", "--no-qnorm",
        "--value-grain", "head", "--sink-tokens", 2, "--recent-tokens", 5, "--seed", 7,
        "--dataset", text_file, *SMALL,
    )  # fmt: skip
    assert ran.code == 0
    found = ran.json
    assert found["schema"] == "kvq.calibrate/1"
    assert found["dry_run"] is False
    assert found["sidecar"] == "a/q"
    assert found["config"] == {
        **found["config"],
        "key_bits": 2,
        "value_bits": 3,
        "outlier_fraction": 0,
        "sensitivity": "none",
        "kmeans": "sklearn",
        "qnorm": False,
        "value_grain": "head",
        "sink_tokens": 2,
        "recent_tokens": 5,
    }
    assert found["calibration"]["seed"] == 7
    assert found["effective_bits"]["tokens"] == 32768
    assert found["effective_bits"]["without_unfinished"] > 2
    assert found["seconds"] > 0
    assert found["peak_memory"]["host_bytes"] > 0
    assert found["next"] == f"kvq eval {tiny_model_dir} --sidecar a/q"
    assert Sidecar.load(tmp_path / "a/q").config.model_dump(mode="json") == found["config"]


def test_mixed_widths_name_the_folder(kvq: Kvq, tiny_model_dir: Path) -> None:
    ran = kvq("calibrate", tiny_model_dir, "--key-bits", 2, "--bits", 3, "--dry-run", "--json")
    assert ran.json["sidecar"] == f"{tiny_model_dir.name}-kvq-k2v3"


def test_without_model_the_embedded_one_is_used_and_said(
    kvq: Kvq, embedded: Path, text_file: Path, tmp_path: Path
) -> None:
    ran = kvq("calibrate", "--dataset", text_file, *SMALL)
    assert ran.code == 0
    assert "Note: no MODEL is named: calibrating the small built-in model" in ran.stderr
    made = Sidecar.load(tmp_path / "tiny-llama-kvq4")
    assert made.base_model.id == "kvq/tiny-llama"
    assert ran.stderr.splitlines()[-1] == "Next: kvq eval --sidecar tiny-llama-kvq4"


def test_dry_run_says_everything_and_does_nothing(
    kvq: Kvq, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", no_weights)
    plain = kvq("calibrate", tiny_model_dir, "--dry-run")
    assert plain.code == 0
    for what in ("dry run", "2 layers", "builtin, 16 x 1024 tokens", "effective bits"):
        assert what in plain.stdout
    found = kvq("calibrate", tiny_model_dir, "--dry-run", "--json").json
    assert (found["schema"], found["dry_run"]) == ("kvq.calibrate/1", True)
    assert list(tmp_path.iterdir()) == []
    assert recall() is None


def test_windows_longer_than_the_model_are_clamped_with_a_note(
    kvq: Kvq, tiny_model_dir: Path
) -> None:
    ran = kvq("calibrate", tiny_model_dir, "--seq-len", 4096, "--dry-run", "--json")
    assert ran.json["seq_len"] == 1024
    assert "Note: --seq-len 4096 is clamped to the model's 1024 positions" in ran.stderr
    assert kvq("calibrate", tiny_model_dir, "--seq-len", 1024, "--dry-run", "--json").stderr == ""


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--bits", 9), 2, "--bits is 9, expected 2, 3 or 4"),
        (("--value-bits", 1), 2, "--value-bits is 1"),
        (("--outlier-fraction", 0.5), 2, "outlier_fraction is 0.5: expected 0 to 0.2"),
        (("--outlier-fraction", "nan"), 2, "outlier_fraction"),
        (("--sink-tokens", -1), 2, "sink_tokens"),
        (("--dataset", "builtin", "--split", "train"), 2, "--split"),
        (("--num-samples", 100_000), 1, "too little text"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(
    kvq: Kvq,
    tiny_model_dir: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    ran = kvq("calibrate", tiny_model_dir, *options, "--json")
    assert ran.code == code
    assert message in error_of(ran)
    assert ran.json["error"]["hint"]
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_or_a_text_that_is_not_there(kvq: Kvq, tiny_model_dir: Path) -> None:
    for arguments in (("./nowhere",), (tiny_model_dir, "--dataset", "./nowhere.txt")):
        ran = kvq("calibrate", *arguments, "--json")
        assert ran.code == 1
        assert "nowhere" in error_of(ran)


def test_an_existing_output_stops_before_any_work(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, sidecar: Path, tmp_path: Path
) -> None:
    arguments = ("calibrate", tiny_model_dir, "-o", "q", "--dataset", text_file, *SMALL, "--json")
    assert kvq(*arguments).code == 0
    before = (tmp_path / "q" / "kvq.safetensors").read_bytes()
    # A text that does not exist would be found out first if the order were another.
    refused = kvq("calibrate", tiny_model_dir, "-o", "q", "--dataset", "nowhere.txt", "--json")
    assert refused.code == 1
    assert "already holds a sidecar" in error_of(refused)
    assert "--overwrite" in refused.json["error"]["hint"]
    assert kvq(*arguments, "--bits", 2, "--overwrite").code == 0
    assert (tmp_path / "q" / "kvq.safetensors").read_bytes() != before
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    other = kvq("calibrate", tiny_model_dir, "-o", "work", "--overwrite", "--json")
    assert other.code == 1
    assert "holds other files" in error_of(other)


def test_a_full_disk_leaves_nothing_behind(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    ran = kvq("calibrate", tiny_model_dir, "--dataset", text_file, *SMALL, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "OutputError"
    assert "disk is full" in error_of(ran)
    assert list(tmp_path.iterdir()) == []
    assert recall() is None


def test_ctrl_c_in_the_middle_leaves_nothing_behind(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kvq_calibration.pipeline, "measure_points", interrupted)
    for flags in ((), ("--json",)):
        ran = kvq("calibrate", tiny_model_dir, "--dataset", text_file, *SMALL, *flags)
        assert ran.code == 130
        assert "interrupted" in ran.stdout + ran.stderr
        assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert recall() is None


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_the_process_in_one_line(
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    command = [
        sys.executable, "-c", "from kvq_cli.app import main; main()",
        "calibrate", tiny_model_dir, "--dataset", text_file, "--num-samples", "32",
        "--seq-len", "512",
    ]  # fmt: skip
    with subprocess.Popen(
        [str(part) for part in command], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        assert "memory" in running.stderr.readline()
        # The first stage is done: the process is in the middle of its work.
        assert "thresholds" in running.stderr.readline()
        running.send_signal(number)
        rest = running.stderr.read()
        assert running.wait(timeout=60) == code
    assert f"Error: {word}; nothing half-written is left behind.\n" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_the_result_alone(
    kvq: Kvq, embedded: Path, text_file: Path, tmp_path: Path
) -> None:
    ran = kvq("calibrate", "-q", "--dataset", text_file, *SMALL)
    assert ran.code == 0
    assert ran.stderr == ""
    assert ran.stdout.startswith("sidecar")


def test_options_may_come_from_the_environment(
    kvq: Kvq, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQ_BITS", "2")
    monkeypatch.setenv("KVQ_MODEL", str(tiny_model_dir))
    assert kvq("calibrate", "--dry-run", "--json").json["config"]["key_bits"] == 2
    found = kvq("calibrate", "--bits", 3, "--dry-run", "--json").json
    assert found["config"]["key_bits"] == 3


def test_a_state_that_cannot_be_kept_is_only_a_warning(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path / "file"))
    ran = kvq("calibrate", tiny_model_dir, "-o", "q", "--dataset", text_file, *SMALL)
    assert ran.code == 0
    assert "Warning: cannot write" in ran.stderr
    assert (tmp_path / "q" / "kvq.safetensors").is_file()


def test_same_inputs_same_bytes(
    kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        kvq("calibrate", tiny_model_dir, "-o", name, "--dataset", text_file, *SMALL)
    for file in ("kvq.safetensors", "kvq_config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / "kvq_config.json").read_text())["format_version"] == 1


def test_average_bits(kvq: Kvq, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    given = ("calibrate", tiny_model_dir, "--average-bits", 2.75, "--dataset", text_file, *SMALL)
    planned = kvq(*given, "--dry-run", "--json").json
    ran = kvq(*given, "--json")
    assert ran.code == 0
    config = ran.json["config"]
    widths = [bits for pair in config["layer_bits"].values() for bits in pair]
    assert set(widths) <= {2, 3, 4}
    assert sum(widths) <= 2.75 * len(widths)
    folder = tmp_path / f"{tiny_model_dir.name}-kvq2.75"
    assert Sidecar.load(folder).config.model_dump(mode="json") == config
    # All of the budget is planned for, and an allocation may leave some of it.
    assert ran.json["effective_bits"]["total"] <= planned["effective_bits"]["total"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--average-bits", 4.5), "expected 2 to 4"),
        (("--average-bits", 3, "--sensitivity", "none"), "needs sensitivity"),
        (("--average-bits", 3, "--bits", 3), "not both"),
        (("--average-bits", 3, "--key-bits", 2), "not both"),
    ],
)
def test_average_bits_that_make_no_sense(
    kvq: Kvq, tmp_path: Path, tiny_model_dir: Path, options: tuple, said: str
) -> None:
    ran = kvq("calibrate", tiny_model_dir, *options, *SMALL, "-o", tmp_path / "q")
    assert ran.code == 2
    assert said in " ".join(ran.stderr.split())
    assert not (tmp_path / "q").exists()
