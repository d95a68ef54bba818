"""Tasks of lm_eval in a folder, with their data beside them: no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: answers
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
GENERATE = """\
task: own_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{max_gen_toks: 6, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
PERPLEXITY = """\
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}]
"""


def choice_task(folder: Path, *, documents: int) -> None:
    """``own_choice``: a question each and four answers, of several tokens."""
    answers = [" a white cat", " the old king", " a small boat", " his own house"]
    rows = [
        {"question": f"On day {day} they saw", "answers": answers, "right": day % 4}
        for day in range(documents)
    ]
    _write(folder / "choice", CHOICE, rows)


def generate_task(folder: Path, *, prompts: Sequence[str]) -> None:
    """``own_answer``: six tokens to be generated behind each prompt."""
    _write(folder / "answer", GENERATE, [{"prompt": p, "answer": "a cat"} for p in prompts])


def perplexity_task(folder: Path, *, texts: Sequence[str]) -> None:
    """``own_text``: the perplexity of whole texts."""
    _write(folder / "text", PERPLEXITY, [{"text": text} for text in texts])


def _write(stem: Path, task: str, rows: Sequence[dict[str, Any]]) -> None:
    data = stem.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stem.with_suffix(".yaml").write_text(task.format(data=data), encoding="utf-8")
