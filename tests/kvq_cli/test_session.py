from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvq_cli.output import Output
from kvq_cli.session import STATE_NAME, cache_folder, current_sidecar, recall, remember, write_json
from kvq_formats.errors import OutputError, SidecarError


def test_the_current_sidecar_is_remembered_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q").mkdir()
    monkeypatch.chdir(tmp_path)
    remember(Path("q"), Output())
    monkeypatch.chdir("/")
    assert current_sidecar(Output()) == tmp_path / "q"
    assert capsys.readouterr().err == f"Note: using the current sidecar, {tmp_path / 'q'}\n"


def test_nothing_calibrated_yet_names_the_command() -> None:
    with pytest.raises(SidecarError, match="none was made yet") as caught:
        current_sidecar(Output())
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("kvq calibrate")


def test_a_sidecar_that_is_gone_names_the_command(tmp_path: Path) -> None:
    remember(tmp_path / "gone", Output())
    with pytest.raises(SidecarError, match="gone, is no longer there") as caught:
        current_sidecar(Output())
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("kvq calibrate")


@pytest.mark.parametrize("state", ["", "[]", "{}", "null", '{"schema": "kvq.session/999"}', "\x00"])
def test_a_state_that_makes_no_sense_is_no_state(state: str) -> None:
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / STATE_NAME).write_text(state)
    assert recall() is None


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path / "file"))
    remember(tmp_path / "q", Output())
    error = capsys.readouterr().err
    assert error.startswith("Warning: cannot write ")
    assert f"--sidecar {tmp_path / 'q'}" in error


def test_write_json_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "results.json"
    write_json(target, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_json(target, {"new": 2})
    assert json.loads(target.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_cache_follows_hugging_face_without_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("KVQ_CACHE")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", "/somewhere/assets")
    assert cache_folder() == Path("/somewhere/assets/kvq")
