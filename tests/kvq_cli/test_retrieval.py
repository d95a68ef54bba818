"""``kvq eval --retrieval`` on a random model: what is asked, what is printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Kvq
from kvq_cli.output import Output
from kvq_cli.retrieval import asked_retrieval
from kvq_cli.session import remember
from kvq_evaluation.retrieval import RETRIEVAL_TASKS
from kvq_formats.errors import ConfigError

FEW = ("--num-examples", 2, "--retrieval-tokens", 400)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_table_of_tasks_and_caches(kvq: Kvq, sidecar: Path) -> None:
    ran = kvq("eval", "--sidecar", sidecar, "--retrieval", "passkey, multi_key", *FEW)
    assert ran.code == 0
    lines = [line.split() for line in ran.stdout.splitlines() if line.strip()]
    assert lines[0][:5] == ["retrieval:", "2", "examples", "a", "task,"]
    assert lines[1] == ["task", "cache", "bits", "eff", "accuracy", "Δ", "nll", "path"]
    assert [line[:2] for line in lines[3:]] == [
        ["passkey", "unquantized"],
        ["passkey", sidecar.name],
        ["multi_key", "unquantized"],
        ["multi_key", sidecar.name],
    ]
    assert {line[-1] for line in lines[3:]} == {"prefill"}
    # Perplexity is only measured where it is asked for.
    assert "ppl" not in ran.stdout
    assert ran.stderr.splitlines()[-1] == f"Next: kvq generate --sidecar {sidecar}"


def test_json_with_baselines_on_both_paths(kvq: Kvq, sidecar: Path, tmp_path: Path) -> None:
    ran = kvq(
        "eval", "--sidecar", sidecar, "--baseline", "hadamard2", "--retrieval", "all", "--seed", 3,
        "--path", "both", "--num-examples", 1, "--retrieval-tokens", 700, "--json", "-o", "r.json",
    )  # fmt: skip
    assert ran.code == 0
    found = ran.json["retrieval"]
    assert ran.json["texts"] == []
    assert (found["tokens"], found["num_examples"], found["seed"]) == (700, 1, 3)
    expected = [
        (task, name, path)
        for task in RETRIEVAL_TASKS
        for name, path in (
            ("unquantized", "prefill"),
            (sidecar.name, "prefill"),
            ("hadamard2", "prefill"),
            (sidecar.name, "decode"),
            ("hadamard2", "decode"),
        )
    ]
    assert [(row["task"], row["name"], row["path"]) for row in found["rows"]] == expected
    assert {row["examples"] for row in found["rows"]} == {1}
    assert all(0.98 * 700 <= row["tokens"] <= 700 for row in found["rows"])
    assert all(row["accuracy_stderr"] is None for row in found["rows"])
    assert [row["difference"] is None for row in found["rows"]] == [
        name == "unquantized" for _, name, _ in expected
    ]
    assert json.loads((tmp_path / "r.json").read_text())["retrieval"] == found


def test_texts_and_retrieval_in_one_run(kvq: Kvq, sidecar: Path, text_file: Path) -> None:
    given = ("--ppl", text_file, "--limit", 1, "--seq-len", 64)
    ran = kvq("eval", "--sidecar", sidecar, "--retrieval", "passkey", *FEW, *given, "--json")
    assert ran.code == 0
    assert len(ran.json["texts"]) == 1
    assert len(ran.json["retrieval"]["rows"]) == 2
    assert kvq("eval", "--sidecar", sidecar, *given, "--json").json["retrieval"] is None


def test_seeds_make_other_texts(kvq: Kvq, sidecar: Path) -> None:
    def nll(seed: int) -> list[float]:
        ran = kvq(
            "eval", "--sidecar", sidecar, "--retrieval", "passkey", *FEW, "--seed", seed, "--json"
        )
        return [row["nll"] for row in ran.json["retrieval"]["rows"]]

    assert nll(0) == nll(0) != nll(1)


def test_short_texts_decode_nothing_from_codes(kvq: Kvq, sidecar: Path) -> None:
    given = ("eval", "--sidecar", sidecar, "--retrieval", "passkey", "--num-examples", 1)
    ran = kvq(*given, "--retrieval-tokens", 240, "--path", "decode")
    assert ran.code == 0
    assert f"Warning: {sidecar.name}: decoding reads nothing from codes in retrieval" in ran.stderr
    assert "--retrieval-tokens" in ran.stderr
    ran = kvq(*given, "--retrieval-tokens", 600, "--path", "decode")
    assert "reads nothing" not in ran.stderr


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--retrieval", "passkeys"), "--retrieval names 'passkeys'", "Did you mean passkey?"),
        (("--retrieval", "haystack"), "--retrieval names 'haystack', expected", "--retrieval all"),
        (("--retrieval", " , "), "--retrieval names no task", "--retrieval all"),
        (("--seed", 1), "about --retrieval", "--retrieval all"),
        (("--num-examples", 1), "about --retrieval", "--retrieval all"),
        (("--retrieval-tokens", 1), "about --retrieval", "--retrieval all"),
        (
            ("--retrieval", "passkey", "--retrieval-tokens", 20),
            "20 tokens are too few for passkey, expected at least",
            "tokens or more",
        ),
        (
            ("--retrieval", "all", "--retrieval-tokens", 1025),
            "longer than the model reads, expected at most its 1024 positions",
            "--retrieval-tokens 1024",
        ),
    ],
)
def test_what_cannot_be_asked_is_said_before_weights_load(
    kvq: Kvq,
    sidecar: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    message: str,
    hint: str,
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("kvq_runtime.models.load_model", no_weights)
    remember(sidecar, Output())
    ran = kvq("eval", *options, "--json")
    assert ran.code == 2
    assert ran.json["error"]["type"] == "ConfigError"
    assert message in ran.json["error"]["message"]
    assert hint in ran.json["error"]["hint"]


@pytest.mark.parametrize("options", [("--num-examples", 0), ("--retrieval-tokens", 0)])
def test_numbers_below_one_are_usage_errors(
    kvq: Kvq, sidecar: Path, options: tuple[object, ...]
) -> None:
    ran = kvq("eval", "--sidecar", sidecar, "--retrieval", "passkey", *options)
    assert ran.code == 2


def test_the_default_is_what_the_model_reads() -> None:
    def tokens(positions: int | None) -> int:
        asked = asked_retrieval(
            "all,passkey", tokens=None, num_examples=None, seed=None, positions=positions
        )
        assert asked is not None
        assert asked.tasks == tuple(RETRIEVAL_TASKS)
        assert (asked.num_examples, asked.seed) == (50, 0)
        return asked.tokens

    assert [tokens(positions) for positions in (512, 131072, None)] == [512, 2048, 2048]


def test_nothing_is_asked() -> None:
    nothing = {"tokens": None, "num_examples": None, "seed": None, "positions": None}
    assert asked_retrieval(None, **nothing) is None
    with pytest.raises(ConfigError):
        asked_retrieval(None, **{**nothing, "seed": 0})
