"""Run the command line in this process, as ``kvq`` would, with a cache folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import Kvq, Ran
from kvq_cli.app import main


@pytest.fixture(autouse=True)
def own_session(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own state; none is told of a CI or a terminal."""
    folder = tmp_path_factory.mktemp("kvq-cache")
    for name in ("CI", "KVQ_DEBUG", "KVQ_JSON", "KVQ_QUIET"):
        monkeypatch.delenv(name, raising=False)
    # Set here, so that what a command sets by default is undone with the test.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The library reads the variable once, maybe before this test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("KVQ_CACHE", str(folder))
    monkeypatch.setenv("COLUMNS", "100")
    return folder


@pytest.fixture
def kvq(capsys: pytest.CaptureFixture[str]) -> Kvq:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = ending.value.code
        return Ran(int(code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def kvq_command(kvq: Kvq) -> Kvq:
    """The same, for tests that call the library kvq."""
    return kvq


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Path:
    """The tiny model in place of the embedded one, so that nothing depends on its training."""
    monkeypatch.setattr("kvq_runtime.resolve.embedded_model_path", lambda: tiny_model_dir)
    return tiny_model_dir


@pytest.fixture(scope="session")
def sidecar(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_file: Path
) -> Path:
    """A sidecar of the tiny model, made once."""
    import kvq as library

    made = library.calibrate(
        tiny_model_dir, bits=3, dataset=str(text_file), num_samples=2, seq_len=128
    )
    return made.save(tmp_path_factory.mktemp("sidecars") / "tiny-kvq3")
