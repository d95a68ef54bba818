from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from command_line import Kvq
from kvq_cli.commands.calibrate import calibrate
from kvq_cli.commands.eval import evaluate
from kvq_cli.measurement import DEFAULT_SEQ_LEN
from kvq_cli.options import chosen_model, environment_name


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--seq-len", "KVQ_SEQ_LEN"),
        ("--qnorm/--no-qnorm", "KVQ_QNORM"),
        ("--json", "KVQ_JSON"),
    ],
)
def test_environment_names(flag: str, name: str) -> None:
    assert environment_name(flag) == name


def test_model_may_be_positional_or_an_option() -> None:
    assert chosen_model("a", None) == chosen_model(None, "a") == "a"
    assert chosen_model(None, None) is None


def test_the_commands_defaults_are_the_librarys() -> None:
    """Help must not import pydantic, so the defaults are written twice: here they are compared."""
    from kvq_calibration.plan import calibrate_from_text
    from kvq_formats.config import KVQConfig

    given = inspect.signature(calibrate).parameters
    fields = KVQConfig.model_fields
    assert given["bits"].default == fields["key_bits"].default == fields["value_bits"].default
    for name in set(fields) & set(given) - {"key_bits", "value_bits"}:
        assert given[name].default == fields[name].default, name
    # Decided by the configuration, not by the command.
    called = inspect.signature(calibrate_from_text).parameters
    for name in ("dataset", "num_samples", "seq_len", "batch_size", "seed", "dtype"):
        assert given[name].default == called[name].default, name


def test_the_default_length_that_help_shows_is_the_one_that_is_used() -> None:
    from typing import get_type_hints

    hints = get_type_hints(evaluate, include_extras=True)
    (declared,) = hints["seq_len"].__metadata__
    assert declared.show_default == str(DEFAULT_SEQ_LEN)


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What ``load_model`` is asked to load in, each time; nothing is loaded."""
    asked: list[object] = []

    def load_model(*_: object, load_in: object, **__: object) -> None:
        asked.append(load_in)
        raise KeyboardInterrupt

    monkeypatch.setattr("kvq_runtime.models.load_model", load_model)
    # Whether bitsandbytes is there is not asked here.
    monkeypatch.setattr("kvq_runtime.weight_quantization.bitsandbytes_config", lambda *_: None)
    return asked


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ([], None, None),
        (["--load-in-4bit"], None, "4bit"),
        (["--load-in-8bit"], None, "8bit"),
        ([], "KVQ_LOAD_IN_4BIT", "4bit"),
        (["--load-in-8bit"], "KVQ_LOAD_IN_4BIT", "8bit"),
        (["--load-in-4bit"], "KVQ_LOAD_IN_8BIT", "4bit"),
    ],
)
def test_the_width_of_the_weights_reaches_every_command(
    kvq: Kvq,
    sidecar: Path,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    loading: list[object],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    environment: str | None,
    expected: str | None,
) -> None:
    if environment is not None:
        monkeypatch.setenv(environment, "1")
    text = ("--dataset", text_file, "--num-samples", 2, "--seq-len", 32)
    commands = [
        ("calibrate", tiny_model_dir, "-o", tmp_path / "q", *text),
        ("eval", "--sidecar", sidecar, "--ppl", text_file, "--seq-len", 32, "--limit", 1),
        ("generate", "--sidecar", sidecar, "-p", "the"),
    ]
    for command in commands:
        assert kvq(*command, *flags).code == 130
    assert loading == [expected] * 3


def test_weights_have_one_width(kvq: Kvq) -> None:
    ran = kvq("eval", "--load-in-4bit", "--load-in-8bit", "--json")
    assert ran.code == 2
    assert "--load-in-4bit or --load-in-8bit, not both" in ran.json["error"]["message"]
