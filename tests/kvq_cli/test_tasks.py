from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvq_cli.output import Output
from kvq_cli.tasks import find_tasks, measure_tasks, tasks_table
from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.task_rows import TaskRow
from kvq_formats.errors import ConfigError
from kvq_formats.sidecar import Sidecar
from local_tasks import choice_task, generate_task
from tiny_models import make_text

pytest.importorskip("lm_eval", reason='tasks need lm_eval: pip install "kvq[eval]"')

ROW = TaskRow(
    task="t",
    metric="acc",
    value=0.5,
    stderr=0.25,
    samples=4,
    path="prefill",
    name=UNQUANTIZED,
    samples_available=4,
)


def printed(rows: list[TaskRow], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    Output().show(tasks_table(rows))
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_rows_and_what_was_not_measured(
    tmp_path: Path,
    tiny_model_dir: Path,
    sidecar: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    choice_task(tmp_path, documents=4)
    # One prompt that is too short for a page, and one that the model cannot read whole.
    generate_task(tmp_path, prompts=["Once upon a time", make_text(3_000)])
    output = Output()
    tasks = find_tasks(output, "own_choice, own_answer", tasks_path=tmp_path)
    rows = measure_tasks(
        output,
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
        {"q3": Sidecar.load(sidecar)},
        tasks,
        limit=1,
        batch_size=2,
    )
    said = capsys.readouterr()
    assert said.out == ""
    assert "Warning: q3: own_answer read nothing from codes: the longest text has" in said.err
    assert [(row.name, row.task) for row in rows] == [
        (UNQUANTIZED, "own_choice"),
        (UNQUANTIZED, "own_answer"),
        ("q3", "own_choice"),
        ("q3", "own_answer"),
    ]
    lines = printed(rows, capsys)
    assert lines[0] == ["partial:", "not", "all", "samples", "of", "each", "task"]
    assert lines[1] == ["task", "metric", "cache", "value", "Δ", "n", "path"]
    assert [line[:3] for line in lines[3:]] == [
        ["own_choice", "acc", "unquantized"],
        ["own_choice", "acc", "q3"],
        ["own_answer", "exact_match", "unquantized"],
        ["own_answer", "exact_match", "q3"],
    ]
    assert [line[-4:] for line in lines[3:5]] == [
        ["1", "of", "4", "prefill"],
        ["1", "of", "4", "prefill"],
    ]
    measure_tasks(
        output,
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
        {},
        tasks,
    )
    said = capsys.readouterr()
    assert "Warning: own_answer: 1 requests are longer than the model reads" in said.err


def test_values_have_errors_and_differences(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(ROW, name="q", value=0.25, difference=-0.25, difference_stderr=None)
    inner = replace(ROW, task="part", of_group=True)
    lines = printed([ROW, inner, other], capsys)
    assert lines[0][0] == "task"
    assert lines[2:] == [
        ["t", "acc", "unquantized", "0.5000", "±", "0.2500", "4", "prefill"],
        ["t", "acc", "q", "0.2500", "±", "0.2500", "-0.2500", "4", "prefill"],
    ]


def test_examples_do_not_go_to_tasks_that_want_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice_task(tmp_path, documents=4)
    generate_task(tmp_path, prompts=["Once"])
    with (tmp_path / "answer.yaml").open("a") as stream:
        stream.write("num_fewshot: 0\n")
    tasks = find_tasks(Output(), "own_choice,own_answer", num_fewshot=2, tasks_path=tmp_path)
    counts = {name: task.get_config("num_fewshot") for name, task in tasks.tasks.items()}
    assert counts == {"own_choice": 2, "own_answer": 0}
    assert "Note: --num-fewshot does not apply to own_answer" in capsys.readouterr().err


def test_no_task_is_named() -> None:
    with pytest.raises(ConfigError, match="--tasks names no task"):
        find_tasks(Output(), " , ")
