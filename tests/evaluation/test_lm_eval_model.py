from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from calibrated import calibrated
from garbage import with_garbage_codebooks
from kvq_calibration.data import load_text
from kvq_evaluation.perplexity import UNQUANTIZED
from kvq_evaluation.task_loading import load_tasks
from kvq_evaluation.task_rows import TaskRow
from kvq_evaluation.tasks import run_tasks
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import ConfigError, DataError, FingerprintMismatchError, KVQError
from kvq_formats.progress import SilentProgress
from kvq_formats.sidecar import Sidecar
from kvq_runtime.attach import attach
from kvq_runtime.embedded import embedded_model_path
from kvq_runtime.evaluation_rule import attach_codec
from local_tasks import GENERATE, choice_task, generate_task, perplexity_task
from tiny_models import make_text, make_tiny_llama

pytest.importorskip("lm_eval", reason='tasks need lm_eval: pip install "kvq[eval]"')


class Garbage:
    """A codec under which every key and value decodes to its negative."""

    sink_tokens = 1
    recent_tokens = 0
    rotated_keys = False

    def __init__(self, layers: int) -> None:
        self.layers = range(layers)

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        return -keys

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        return -values


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture(scope="module")
def sidecar(model: LlamaForCausalLM) -> Sidecar:
    return calibrated(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind; its prompts to generate from fill more than one page of 256 tokens."""
    made = tmp_path_factory.mktemp("tasks")
    choice_task(made, documents=8)
    generate_task(made, prompts=[make_text(300 + 20 * place, seed=place) for place in range(2)])
    # A text that the model was trained for: garbage cannot make nonsense much less likely.
    text = " ".join(itertools.islice(load_text("builtin:dev", purpose="eval").texts, 20))
    perplexity_task(made, texts=[text[:1_500], text[1_500:2_500]])
    return made


@pytest.fixture
def lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    from kvq_evaluation.lm_eval_model import KVQLM, CacheVariant

    def make(
        *,
        scoring: Any = nullcontext,
        generating: Any = nullcontext,
        batch_size: int = 1,
        **others: Any,
    ) -> KVQLM:
        return KVQLM(
            others.get("model", model),
            tokenizer,
            variant=CacheVariant("x", scoring=scoring, generating=generating),
            batch_size=batch_size,
            progress=SilentProgress(),
        )

    return make


def scoring_request(context: str, continuation: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, (context, continuation), 0, ("t", 0, 1))


def generation_request(context: str, tokens: int = 8) -> Any:
    from lm_eval.api.instance import Instance

    options = {"max_gen_toks": tokens, "until": ["\x00"]}
    return Instance("generate_until", {}, (context, options), 0, ("t", 0, 1))


PAIRS = [
    ("The cat sat on the", " mat and slept"),
    ("The cat sat on the", " mat"),
    ("Once upon a time there was a king who had", " a daughter"),
    ("", "Hello there"),
]


def by_hand(model: LlamaForCausalLM, tokenizer: Any, context: str, continuation: str) -> float:
    """One text a forward: the sum of the continuation's log-probabilities."""
    if context:
        prompt = tokenizer.encode(context)
        ids = tokenizer.encode(context + continuation)
    else:
        prompt = [tokenizer.bos_token_id]
        ids = [*prompt, *tokenizer.encode(continuation, add_special_tokens=False)]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    places = range(len(prompt), len(ids))
    return float(sum(logits[place - 1, ids[place]] for place in places))


def test_likelihoods_are_those_of_one_text_a_forward(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, lm: Callable[..., Any]
) -> None:
    expected = [by_hand(model, tokenizer, *pair) for pair in PAIRS]
    for batch_size in (1, 3):
        found = lm(batch_size=batch_size).loglikelihood([scoring_request(*pair) for pair in PAIRS])
        assert [one for one, _ in found] == pytest.approx(expected, abs=1e-3)


def test_padding_reaches_no_codec(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sidecar: Sidecar,
    lm: Callable[..., Any],
) -> None:
    seen = []

    class Watching(Garbage):
        def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
            seen.append(keys.shape[1])
            return -keys

    codec = Watching(model.config.num_hidden_layers)
    scorer = lm(scoring=partial(attach_codec, model, codec), batch_size=3)
    found = scorer.loglikelihood([scoring_request(*pair) for pair in PAIRS])
    with attach_codec(model, Garbage(model.config.num_hidden_layers)):
        expected = [by_hand(model, tokenizer, *pair) for pair in PAIRS]
    assert [one for one, _ in found] == pytest.approx(expected, abs=1e-3)
    # The last token is a label and the first a sink. The first pair's inputs and the second's are
    # different texts, so that there are four, in every layer.
    lengths = [
        len(tokenizer.encode(context + continuation)) - (2 if context else 1)
        for context, continuation in PAIRS
    ]
    lengths[3] = len(tokenizer.encode("Hello there", add_special_tokens=False)) - 1
    assert sorted(seen) == sorted(lengths * model.config.num_hidden_layers)


def test_answers_that_differ_in_the_last_token_share_a_forward(
    model: LlamaForCausalLM, lm: Callable[..., Any]
) -> None:
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        found = lm().loglikelihood([scoring_request("Is it", answer) for answer in (" A", " B")])
    finally:
        hook.remove()
    assert len(forwards) == 1
    assert found[0][0] != found[1][0]


def test_greedy_says_whether_the_model_would_have_written_it(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, lm: Callable[..., Any]
) -> None:
    context = "The king said"
    ids = torch.tensor([tokenizer.encode(context)])
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    likeliest = tokenizer.decode([best])
    assert tokenizer.encode(context + likeliest) == [*ids[0].tolist(), best]
    found = lm().loglikelihood(
        [scoring_request(context, likeliest), scoring_request(context, " zzz")]
    )
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_windows_add_up_to_the_whole_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, lm: Callable[..., Any]
) -> None:
    from lm_eval.api.instance import Instance

    text = make_text(400, seed=3)
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))
    scorer = lm(batch_size=2)
    (whole,) = scorer.loglikelihood_rolling([request])
    ids = [tokenizer.bos_token_id, *scorer.tok_encode(text)]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    expected = float(logits.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
    assert whole == pytest.approx(expected, rel=1e-4)
    assert scorer.longest == {"t": len(ids)}


def test_long_texts_lose_their_beginning_and_say_so(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, lm: Callable[..., Any]
) -> None:
    scorer = lm()
    scorer._max_length = 16
    context = make_text(100, seed=4)
    ((found, _),) = scorer.loglikelihood([scoring_request(context, " and")])
    ids = tokenizer.encode(context + " and")
    with torch.no_grad():
        logits = model(torch.tensor([ids[-17:-1]]), use_cache=False).logits[0].log_softmax(-1)
    prompt = len(tokenizer.encode(context))
    expected = sum(float(logits[place - len(ids), ids[place]]) for place in range(prompt, len(ids)))
    assert found == pytest.approx(expected, abs=1e-3)
    assert scorer.truncated == {"t": 1}
    assert scorer.longest == {"t": 17}


def test_padded_batches_generate_what_single_texts_do(
    model: LlamaForCausalLM, sidecar: Sidecar, lm: Callable[..., Any]
) -> None:
    runtime = partial(attach, model, sidecar, rule="runtime")
    requests = [generation_request(make_text(length, seed=length)) for length in (340, 150, 290)]
    single = lm(generating=runtime).generate_until(requests)
    assert lm(generating=runtime, batch_size=3).generate_until(requests) == single
    # Prompts of more than a page, so that pages of codes were read.
    generator = lm(generating=partial(attach, model, with_garbage_codebooks(sidecar)))
    assert generator.generate_until(requests) != single
    assert generator.longest["t"] > PAGE_TOKENS + 8


def test_a_task_that_leaves_no_room_for_prompts(lm: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"t generates up to 5000 tokens.*2048 positions"):
        lm().generate_until([generation_request("Once", tokens=5000)])


def test_both_kinds_of_requests_read_what_is_quantized(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sidecar: Sidecar,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules: list[str] = []

    def watched(*arguments: Any, rule: str, **others: Any) -> Any:
        rules.append(rule)
        return attach(*arguments, rule=rule, **others)

    monkeypatch.setattr("kvq_runtime.attach.attach", watched)
    implementation = model.config._attn_implementation
    rows = run_tasks(
        model,
        tokenizer,
        {"4 bit": sidecar, "garbage": with_garbage_codebooks(sidecar)},
        ["own_choice", "own_answer", "own_text"],
        include_path=folder,
        batch_size=4,
    )
    # For each sidecar once a kind: choices and whole texts are likelihoods, asked for apart.
    assert rules == ["evaluation", "runtime", "evaluation"] * 2
    assert model.config._attn_implementation == implementation
    found = {(row.name, row.task, row.metric): row for row in rows}
    assert [row.name for row in rows] == sorted(
        (row.name for row in rows), key=[UNQUANTIZED, "4 bit", "garbage"].index
    )
    assert {(row.task, row.path) for row in rows} == {
        ("own_choice", "prefill"),
        ("own_answer", "decode"),
        ("own_text", "prefill"),
    }
    stock, ours, garbage = (
        found[name, "own_text", "word_perplexity"].value
        for name in (UNQUANTIZED, "4 bit", "garbage")
    )
    assert ours < 1.2 * stock
    assert garbage > 2 * stock
    assert found[UNQUANTIZED, "own_choice", "acc"].samples == 8
    assert found[UNQUANTIZED, "own_answer", "exact_match"].longest > PAGE_TOKENS


def test_a_codec_scores_and_does_not_generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    codecs = {"garbage": Garbage(model.config.num_hidden_layers)}
    stock, wrecked = (
        row
        for row in run_tasks(model, tokenizer, {}, ["own_text"], codecs=codecs, include_path=folder)
        if row.metric == "word_perplexity"
    )
    assert (stock.name, wrecked.name) == (UNQUANTIZED, "garbage")
    assert wrecked.value > 2 * stock.value
    assert wrecked.difference == wrecked.value - stock.value
    with pytest.raises(ConfigError, match="own_answer generates text, but garbage has no packed"):
        run_tasks(model, tokenizer, {}, ["own_answer"], codecs=codecs, include_path=folder)


def test_examples_in_prompts_are_the_same_for_every_cache_and_run(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    class Exact(Garbage):
        def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
            return keys

        def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
            return values

    prompts: list[list[str]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: prompts[-1].extend(map(str, kwargs["input_ids"].tolist())),
        with_kwargs=True,
    )

    def run(seed: int) -> list[TaskRow]:
        prompts.append([])
        return run_tasks(
            model,
            tokenizer,
            {},
            ["own_choice"],
            codecs={"exact": Exact(model.config.num_hidden_layers)},
            include_path=folder,
            num_fewshot=2,
            limit=3,
            seed=seed,
        )

    try:
        rows, again, other = run(1), run(1), run(2)
    finally:
        hook.remove()
    assert rows == again
    first, second = prompts[0][: len(prompts[0]) // 2], prompts[0][len(prompts[0]) // 2 :]
    assert first == second
    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]
    assert [row.num_fewshot for row in other] == [2] * len(other)
    assert all(row.partial and (row.samples, row.samples_available) == (3, 8) for row in rows)


def test_nothing_of_the_process_changes_and_nothing_is_said(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from tqdm import tqdm

    def state() -> tuple[object, ...]:
        return (
            random.getstate(),
            torch.get_rng_state().tolist(),
            logging.getLogger("lm_eval").level,
            tqdm.__init__,
            sys.stdout,
            os.environ.get("DISABLE_MULTIPROC"),
            tokenizer.pad_token,
            tokenizer.padding_side,
            model.training,
        )

    model.train()
    before = state()
    try:
        run_tasks(model, tokenizer, {}, ["own_choice", "own_answer"], include_path=folder, limit=1)
        assert state() == before
    finally:
        model.eval()
    assert capfd.readouterr() == ("", "")


def test_errors_name_what_mends_them(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sidecar: Sidecar,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = partial(run_tasks, model, tokenizer, include_path=folder)
    with pytest.raises(DataError, match="lm_eval has no task hellaswagg") as unknown:
        load_tasks(["own_choice", "hellaswagg"], include_path=folder)
    assert unknown.value.hint is not None
    assert "hellaswag," in unknown.value.hint
    with pytest.raises(DataError, match="there is no folder"):
        load_tasks(["own_choice"], include_path=folder / "nowhere")
    with pytest.raises(ConfigError, match="limit is 0"):
        run({}, ["own_choice"], limit=0)
    with pytest.raises(ConfigError, match="two caches are named 'unquantized'"):
        run({UNQUANTIZED: sidecar}, ["own_choice"])
    with pytest.raises(FingerprintMismatchError):
        run({"tiny": calibrated(make_tiny_llama())}, ["own_choice"])
    (tmp_path / "lost.yaml").write_text(GENERATE.format(data=tmp_path / "lost.jsonl"))
    with pytest.raises(DataError, match="the data of the task own_answer cannot be had"):
        load_tasks(["own_answer"], include_path=tmp_path)
    monkeypatch.setattr("kvq_evaluation.task_loading.find_spec", lambda _: None)
    with pytest.raises(KVQError) as missing:
        run({}, ["own_choice"])
    assert missing.value.hint == 'pip install "kvq[eval]"'


def test_rows_pair_samples() -> None:
    from kvq_evaluation.task_rows import with_differences

    def row(name: str, each: tuple[float, ...]) -> TaskRow:
        return TaskRow(
            task="t",
            metric="acc",
            value=sum(each) / len(each),
            stderr=None,
            samples=len(each),
            path="prefill",
            name=name,
            samples_available=len(each),
            each=each,
        )

    first, ours = with_differences([row(UNQUANTIZED, (1, 1, 0, 0)), row("q", (0, 1, 0, 0))])
    assert first.difference is None
    # Differences -1, 0, 0, 0: mean -1/4, squared deviations 9/16 + 3/16 = 3/4, variance 1/4, and
    # the error sqrt(1/4 / 4) = 1/4.
    assert ours.difference == -0.25
    assert ours.difference_stderr == pytest.approx(0.25)
    plain = TaskRow("t", "ppl", math.inf, None, 1, "prefill", "q", 2).to_json()
    assert plain["value"] is None
    assert plain["partial"] is True
    assert json.dumps(plain, allow_nan=False)
