"""The paper's table: its protocol, and the script from a model folder to the file of rows."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path
from typing import Any

import paper_plan
import paper_table
import pytest
import torch
from paper_plan import Row, read_text, wanted_rows
from paper_protocol import PUBLISHED, Published, cut_windows, draw_samples, find_published, text_ids
from torch.nn import functional

from kvq_calibration.bundled import stand_in_source
from kvq_calibration.data import load_text, token_windows
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError, DataError
from kvq_formats.fingerprint import Fingerprint
from tiny_models import make_tiny_llama

# A page of 256 tokens and a little more.
CONTEXT = 288


def arguments(model: Path, text: Path, output: Path, *more: str) -> Any:
    return paper_table.parse(
        [
            *("--model", str(model), "--dataset", str(text), "--calibration-dataset", str(text)),
            *("--dtype", "float32", "--context", str(CONTEXT), "--limit", "3"),
            *("--num-samples", "2", "--sample-tokens", "64", "--output", str(output), *more),
        ]
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str, *, fail_at: int = 99) -> list[str]:
    calls: list[str] = []
    stock = getattr(paper_table, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(name)
        return stock(*args, **kwargs)

    monkeypatch.setattr(paper_table, name, counted)
    return calls


# Windows and samples.


@pytest.mark.parametrize("length", [288, 289, 575, 576, 1500])
def test_windows_are_those_of_gptq(length: int) -> None:
    ids = torch.arange(length)[None]
    naive = [ids[0, i * CONTEXT : (i + 1) * CONTEXT] for i in range(ids.numel() // CONTEXT)]
    windows = cut_windows(list(range(length)), context=CONTEXT, stride=CONTEXT)
    assert torch.equal(windows.input_ids, torch.stack(naive))
    assert windows.available == len(naive)
    assert set(windows.scored) == {CONTEXT - 1}


def test_windows_are_those_of_kvq_eval(tiny_model_dir: Path, text_file: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    source = load_text(str(text_file), purpose="eval")
    ids = text_ids(tokenizer, source)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    for limit in (None, 1, 7):
        theirs = token_windows(tokenizer, source, num_windows=limit, seq_len=CONTEXT)
        windows = cut_windows(ids, context=CONTEXT, stride=CONTEXT, limit=limit)
        assert torch.equal(windows.input_ids, theirs.input_ids)
        assert windows.available == theirs.windows_total


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 1), (8, 3), (8, 7), (2, 1), (2, 2)])
@pytest.mark.parametrize("length", [8, 9, 41])
def test_a_shorter_stride_scores_each_token_once(length: int, context: int, stride: int) -> None:
    windows = cut_windows(list(range(length)), context=context, stride=stride)
    labels: list[int] = []
    for window, count in zip(windows.input_ids.tolist(), windows.scored, strict=True):
        labels += window[len(window) - count :]
        assert len(window) == context
        # What is scored has its context before it.
        assert len(labels) == context - 1 or context - count >= min(context - stride, 1)
    firsts = {0} if stride < context else {*range(0, length, context)}
    end = windows.input_ids[-1, -1].item()
    assert labels == [label for label in range(int(end) + 1) if label not in firsts]
    # No further window would fit.
    assert length - context - stride < windows.input_ids[-1, 0] <= length - context


def test_samples_are_those_of_gptq() -> None:
    ids = list(range(5000))
    random.seed(3)
    naive = []
    for _ in range(16):
        i = random.randint(0, len(ids) - 64 - 1)
        naive.append(ids[i : i + 64])
    assert draw_samples(ids, num_samples=16, seq_len=64, seed=3).tolist() == naive


@pytest.mark.parametrize(
    ("numbers", "error", "says"),
    [
        ({"context": 1, "stride": 1}, ConfigError, "--context is 1"),
        ({"context": 8, "stride": 9}, ConfigError, "--stride is 9, expected 1 to 8"),
        ({"context": 8, "stride": 0}, ConfigError, "--stride is 0"),
        ({"context": 8, "stride": 8, "limit": 0}, ConfigError, "--limit is 0"),
        ({"context": 101, "stride": 8}, DataError, "100 tokens, less than one window of 101"),
    ],
)
def test_windows_that_are_refused(
    numbers: dict[str, int], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        cut_windows(list(range(100)), **numbers)


def test_samples_that_are_refused() -> None:
    with pytest.raises(DataError, match="100 tokens, expected more than 100"):
        draw_samples(list(range(100)), num_samples=1, seq_len=100, seed=0)
    with pytest.raises(ConfigError, match="0 samples"):
        draw_samples(list(range(100)), num_samples=0, seq_len=10, seed=0)


def test_bundled_text_does_not_stand_in_for_the_training_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        paper_plan,
        "load_text",
        lambda dataset, purpose: stand_in_source(dataset, purpose=purpose, reason="no network"),
    )
    # The bundled test split is the test split.
    assert read_text("wikitext2", purpose="eval").notes
    with pytest.raises(DataError, match="training split of wikitext2 is out of reach"):
        read_text("wikitext2", purpose="calibrate")


# Rows and published figures.


def test_rows_are_chosen() -> None:
    names = [row.name for row in wanted_rows("16,4,3,2", "0,0.01")]
    widths = [(f"{bits} bit NUQ", f"{bits} bit NUQ + 1 %") for bits in (4, 3, 2)]
    assert names == ["unquantized", *(name for both in widths for name in both)]
    assert [row.name for row in wanted_rows("3,3", "0.02")] == ["3 bit NUQ + 2 %"]
    for row in wanted_rows("3", "0,0.01"):
        fraction = 0.01 if "1 %" in row.name else 0.0
        made = KVQConfig(key_bits=3, value_bits=3, outlier_fraction=fraction)
        assert row.config(sink_tokens=1, qnorm=True) == made
    for bits, fractions in (("5", "0"), ("3", "0.5"), ("three", "0"), ("3", "")):
        with pytest.raises(ConfigError):
            wanted_rows(bits, fractions)


def fingerprint(published: Published, **changes: Any) -> Fingerprint:
    rope = {"rope_type": "default", "rope_theta": published.rope_theta}
    facts = {"num_attention_heads": 32, "head_dim": 128, "qk_norm": False, "rope": rope}
    return Fingerprint.model_validate({**facts, **published.shape, **changes})


def test_models_of_the_table_are_recognised() -> None:
    for published in PUBLISHED:
        found = find_published(
            "auto", fingerprint=fingerprint(published), positions=published.positions
        )
        assert found is published
    llama3 = PUBLISHED[2]
    # Llama 3.1 has the same matrices.
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    changed = fingerprint(llama3, rope=rope)
    assert find_published("auto", fingerprint=changed, positions=131_072) is None
    assert find_published("auto", fingerprint=changed, positions=8192) is None
    assert find_published("none", fingerprint=fingerprint(llama3), positions=8192) is None
    assert find_published("llama-3-8b", fingerprint=changed, positions=1) is llama3
    with pytest.raises(ConfigError, match="Llama-4"):
        find_published("Llama-4", fingerprint=changed, positions=1)


def test_published_figures_of_real_configurations() -> None:
    from transformers import LlamaConfig, MistralConfig

    llama = LlamaConfig()
    found = {
        "LLaMA-7B": (llama, 2048),
        "Llama-2-7B": (llama, 4096),
        "Mistral-7B": (MistralConfig(max_position_embeddings=32_768), 32_768),
    }
    for name, (config, positions) in found.items():
        made = Fingerprint.from_config(config.to_dict())
        published = find_published("auto", fingerprint=made, positions=positions)
        assert published is not None
        assert published.name == name


# From a folder to a file.


@pytest.fixture(scope="module")
def measured(
    tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("results") / "paper-table.csv"
    more = ("--bits", "16,4,2", "--published", "LLaMA-7B")
    paper_table.run(arguments(tiny_model_dir, text_file, output, *more))
    return output


def test_rows_of_a_model(measured: Path) -> None:
    rows = {row["name"]: row for row in rows_of(measured)}
    assert set(rows) == {row.name for row in wanted_rows("16,4,2", "0,0.01")}
    first = rows["unquantized"]
    assert (float(first["kl"]), float(first["agreement"])) == (0, 1)
    assert float(first["effective_bits"]) == 32
    for name, row in rows.items():
        assert row["tokens"] == str(3 * (CONTEXT - 1))
        assert (row["windows"], row["partial"]) == ("3", "True")
        assert (row["seq_len"], row["stride"], row["sink_tokens"]) == (str(CONTEXT),) * 2 + ("1",)
        assert all(row[it] for it in ("commit", "device", "torch", "transformers", "weights"))
        assert name == "unquantized" or float(row["kl"]) > 0
    kl = {name: float(row["kl"]) for name, row in rows.items()}
    assert kl["2 bit NUQ"] > kl["2 bit NUQ + 1 %"] > kl["4 bit NUQ + 1 %"]
    bits = {name: float(row["effective_bits"]) for name, row in rows.items()}
    assert bits["4 bit NUQ + 1 %"] > bits["4 bit NUQ"] > bits["2 bit NUQ + 1 %"] > bits["2 bit NUQ"]


def test_published_figures_stand_beside_ours(measured: Path) -> None:
    rows = {row["name"]: row for row in rows_of(measured)}
    for name, figure in {"unquantized": 5.68, "4 bit NUQ + 1 %": 5.69, "2 bit NUQ": 7.23}.items():
        row = rows[name]
        assert float(row["published"]) == figure
        # Seven digits are written.
        ours = float(row["perplexity"])
        assert float(row["difference"]) == pytest.approx(ours - figure, rel=1e-5)
        assert float(row["published_increase"]) == pytest.approx(figure - 5.68)
    assert rows["4 bit NUQ"]["published"] == rows["4 bit NUQ"]["difference"] == ""


def test_perplexity_is_that_of_all_losses(
    measured: Path, tiny_model_dir: Path, text_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"]
    windows = cut_windows(ids, context=CONTEXT, stride=CONTEXT, limit=3).input_ids
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    nlls = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            # As GPTQ does: the mean of a window, times its length; then divided by all lengths.
            nlls.append(functional.cross_entropy(logits, window[1:]) * CONTEXT)
    expected = float((torch.stack(nlls).sum() / (len(windows) * CONTEXT)).exp())
    assert float(rows_of(measured)[0]["perplexity"]) == pytest.approx(expected, rel=1e-5)


def test_a_shorter_stride_scores_what_is_new(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table.csv"
    given = arguments(tiny_model_dir, text_file, output, "--bits", "16", "--stride", "100")
    windows = paper_plan.make_plan(given).windows
    assert windows.scored == (100, 100, 100)
    paper_table.run(given)
    model = make_tiny_llama()
    with torch.no_grad():
        log_p = model(windows.input_ids).logits[:, :-1].log_softmax(-1)
    losses = -log_p.gather(-1, windows.input_ids[:, 1:, None])[:, -100:]
    (row,) = rows_of(output)
    assert row["tokens"] == "300"
    assert float(row["perplexity"]) == pytest.approx(float(losses.mean().exp()), rel=1e-4)


def test_a_run_goes_on_where_it_stopped(
    measured: Path,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "table.csv"
    given = arguments(tiny_model_dir, text_file, output, "--bits", "16,2", "--published", "none")
    with monkeypatch.context() as interrupted:
        count_calls(interrupted, "evaluate_caches", fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            paper_table.run(given)
    assert [row["name"] for row in rows_of(output)] == ["unquantized", "2 bit NUQ"]
    calls = count_calls(monkeypatch, "evaluate_caches")
    loads = count_calls(monkeypatch, "load_model")
    paper_table.run(given)
    assert (len(calls), len(loads)) == (1, 1)
    resumed = {row["name"]: row["perplexity"] for row in rows_of(output)}
    assert len(resumed) == 3
    whole = {row["name"]: row["perplexity"] for row in rows_of(measured)}
    assert resumed == {name: whole[name] for name in resumed}
    # Nothing is left to do, and the table is printed all the same.
    capsys.readouterr()
    paper_table.run(given)
    assert (len(calls), len(loads)) == (1, 1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in resumed)
    # Another sink is another measurement, beside the first.
    one = ("--bits", "2", "--outlier-fraction", "0")
    paper_table.run(arguments(tiny_model_dir, text_file, output, *one, "--sink-tokens", "0"))
    assert (len(calls), len(rows_of(output))) == (2, 4)
    paper_table.run(arguments(tiny_model_dir, text_file, output, *one, "--overwrite"))
    assert (len(calls), len(rows_of(output))) == (3, 4)


def test_rows_of_other_weights_are_not_mixed(
    measured: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    import shutil

    output = tmp_path / "table.csv"
    shutil.copy(measured, output)
    other = tmp_path / tiny_model_dir.name
    shutil.copytree(tiny_model_dir, other)
    make_tiny_llama(seed=1).save_pretrained(other)
    with pytest.raises(ConfigError, match="with weights") as caught:
        paper_table.run(arguments(other, text_file, output, "--bits", "3"))
    assert "--overwrite" in str(caught.value.hint)
    assert output.read_bytes() == measured.read_bytes()


def test_files_that_are_no_results(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "other.csv"
    output.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no rows of a table like this one"):
        paper_table.run(arguments(tiny_model_dir, text_file, output))
    assert output.read_text() == "a,b\n1,2\n"


def test_a_context_beyond_the_positions(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    given = arguments(tiny_model_dir, text_file, tmp_path / "x.csv", "--context", "1025")
    with pytest.raises(ConfigError, match="--context is 1025, but the model has 1024 positions"):
        paper_table.run(given)


def test_the_paper_s_protocol_is_the_default(tiny_model_dir: Path, text_file: Path) -> None:
    given = paper_table.parse(["--model", str(tiny_model_dir), "--dataset", str(text_file)])
    assert (given.num_samples, given.sample_tokens, given.seed) == (16, 2048, 0)
    assert (given.sink_tokens, given.dtype) == (1, "float16")
    plan = paper_plan.make_plan(given)
    assert plan.published is None
    # The model's own context, and no overlap.
    assert plan.windows.input_ids.shape[1] == plan.settings["stride"] == 1024
    assert plan.windows.available == len(plan.windows.input_ids)
    assert [row.name for row in plan.rows] == [
        row.name for row in wanted_rows("16,4,3,2", "0,0.01")
    ]
    assert Row(None) in plan.rows


def test_what_deviates_takes_the_published_figures_away(
    tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_plan.protocol, "find_published", lambda *_, **__: PUBLISHED[0])
    command = ["--model", str(tiny_model_dir), "--dataset", str(text_file), "--context", "512"]
    changes = itertools.chain(["--sink-tokens", "0"])
    plan = paper_plan.make_plan(paper_table.parse([*command, *changes]))
    assert plan.published is None
    (note,) = [note for note in plan.notes if note.startswith("no published figures")]
    assert "--context 512 (the paper: 2048)" in note
    assert "--sink-tokens 0 (the paper: 1)" in note
    assert "--calibration-dataset" not in note
