from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from kvq_evaluation.baselines.hadamard_int import HadamardInt
from kvq_evaluation.perplexity import PIECE_TOKENS, UNQUANTIZED, MeasuredPath, evaluate
from kvq_formats.errors import CalibrationError, ConfigError, DataError
from kvq_runtime.cache_argument import CACHE, with_one_name
from kvq_runtime.evaluation_rule import attach_codec


def random_windows(count: int, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(320, (count, length), generator=generator)


@contextmanager
def changed_head(model: LlamaForCausalLM, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the logits: a variant that needs no cache."""
    hook = model.lm_head.register_forward_hook(lambda _m, _args, output: change(output))
    try:
        yield
    finally:
        hook.remove()


def variant(
    model: LlamaForCausalLM, change: Callable[[Tensor], Tensor]
) -> Callable[[], AbstractContextManager[None]]:
    return lambda: changed_head(model, change)


def test_perplexity_is_exp_of_the_mean_loss(tiny_llama: LlamaForCausalLM) -> None:
    windows = random_windows(3, 40)
    (metrics,) = evaluate(tiny_llama, windows, variants={})
    assert metrics.name == UNQUANTIZED
    assert metrics.tokens.tolist() == [39, 39, 39]
    with torch.no_grad():
        logits = tiny_llama(windows).logits.double()
    losses = functional.cross_entropy(
        logits[:, :-1].reshape(-1, 320), windows[:, 1:].reshape(-1), reduction="none"
    )
    # exp, subtraction and log-partition of f32 logits with a range below 64.
    assert metrics.nll.sum() / 117 == pytest.approx(float(losses.mean()), abs=2.0**-24 * 68)
    assert metrics.perplexity.mean == pytest.approx(float(losses.mean().exp()), rel=1e-4)


def test_variants_are_measured_against_the_unquantized_model(tiny_llama: LlamaForCausalLM) -> None:
    windows = random_windows(2, 30)
    metrics = evaluate(
        tiny_llama,
        windows,
        variants={
            "same": nullcontext,
            "shifted": variant(tiny_llama, lambda x: x + 1),
            "flat": variant(tiny_llama, torch.zeros_like),
        },
    )
    assert [m.name for m in metrics] == [UNQUANTIZED, "same", "shifted", "flat"]
    unquantized, same, shifted, flat = metrics
    assert torch.equal(unquantized.kl, torch.zeros(2, dtype=torch.float64))
    assert unquantized.mean_agreement == 1
    assert torch.equal(same.kl, unquantized.kl)
    assert torch.equal(same.nll, unquantized.nll)
    assert shifted.mean_kl.mean == pytest.approx(0, abs=1e-5)
    assert flat.perplexity.mean == pytest.approx(320)
    with torch.no_grad():
        log_p = tiny_llama(windows).logits[:, :-1].double().log_softmax(-1)
    against_flat = (log_p.exp() * (log_p + torch.tensor(320.0).log())).sum((1, 2))
    assert flat.kl.tolist() == pytest.approx(against_flat.tolist(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_change_nothing(tiny_llama: LlamaForCausalLM, batch_size: int) -> None:
    # A short last window has a batch to itself.
    windows = [*random_windows(5, 50), random_windows(1, 17)[0]]
    codec = HadamardInt(bits=4, layers=[0, 1])
    variants = {"hadamard": lambda: attach_codec(tiny_llama, codec)}
    one = evaluate(tiny_llama, windows, variants=variants)
    many = evaluate(tiny_llama, windows, variants=variants, batch_size=batch_size)
    assert one[0].tokens.tolist() == [49, 49, 49, 49, 49, 16]
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert a.nll.tolist() == pytest.approx(b.nll.tolist(), rel=1e-4)
    assert one[1].mean_kl.mean == pytest.approx(many[1].mean_kl.mean, rel=0.05)
    assert one[1].mean_kl.mean > 0


def test_logits_are_dropped_after_their_batch(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(output))

    hook = tiny_llama.lm_head.register_forward_hook(watch)
    try:
        evaluate(tiny_llama, random_windows(3, 20), variants={"a": nullcontext, "b": nullcontext})
    finally:
        hook.remove()
    # Older logits that live when new ones arrive: none, or the unquantized model's of the batch.
    assert alive == [0, 1, 1] * 3


@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_only_the_last_tokens_of_a_window_may_count(
    tiny_llama: LlamaForCausalLM, path: MeasuredPath
) -> None:
    length = PIECE_TOKENS + 20
    windows = random_windows(3, length)
    # Into the first piece of decoding, into the second, and one token.
    scored = [length - 1 - 10, 7, 1]
    flat = {"flat": variant(tiny_llama, lambda x: x / 2)}
    options: dict[str, Any] = {"variants": flat, "path": path, "batch_size": 2}
    for metrics in evaluate(tiny_llama, windows, scored=scored, **options):
        assert metrics.tokens.tolist() == scored
    with torch.no_grad():
        log_p = tiny_llama(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -log_p.gather(-1, windows[:, 1:, None])[..., 0]
    expected = [float(nll[row, -count:].sum()) for row, count in enumerate(scored)]
    unquantized, _ = evaluate(tiny_llama, windows, scored=scored, **options)
    assert unquantized.nll.tolist() == pytest.approx(expected, rel=1e-5)
    # Counting all tokens by name is what happens without.
    everything = [length - 1] * 3
    for a, b in zip(
        evaluate(tiny_llama, windows, scored=everything, **options),
        evaluate(tiny_llama, windows, **options),
        strict=True,
    ):
        assert torch.equal(a.nll, b.nll)
        assert torch.equal(a.kl, b.kl)


@pytest.mark.parametrize("scored", [[5], [9, 10], [0, 9]])
def test_counts_that_do_not_fit_are_refused(tiny_llama: LlamaForCausalLM, scored: Any) -> None:
    with pytest.raises(ConfigError, match="scored"):
        evaluate(tiny_llama, random_windows(2, 10), variants={}, scored=scored)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_decoding_through_a_cache_scores_the_same_tokens(
    tiny_llama: LlamaForCausalLM, batch_size: int
) -> None:
    # Two pieces and a half, and a window with a batch to itself.
    windows = [*random_windows(3, 2 * PIECE_TOKENS + 33), random_windows(1, 2)[0]]
    whole, decoded = evaluate(
        tiny_llama,
        windows,
        variants={"stock cache": nullcontext},
        path="decode",
        batch_size=batch_size,
    )
    assert torch.equal(whole.tokens, decoded.tokens)
    # The stock cache is exact, so that sums differ by rounding: 2**-24 of a logit for each of some
    # 200 operations of a forward and each logit's size, below 16.
    difference = 2.0**-24 * 200 * 16
    assert (whole.nll - decoded.nll).abs().max() <= 2 * difference * whole.tokens.max()
    assert decoded.kl.abs().max() <= (2.0**-23 * 40 + difference**2) * whole.tokens.max()
    assert decoded.mean_agreement > 0.99


def test_decoding_feeds_one_token_a_forward_and_no_old_cache(tiny_llama: LlamaForCausalLM) -> None:
    fed: list[tuple[tuple[int, ...], int]] = []

    def watch(_module: nn.Module, _args: object, arguments: dict[str, Any]) -> None:
        cache = with_one_name(arguments).get(CACHE)
        fed.append((tuple(arguments["input_ids"].shape), cache.get_seq_length() if cache else 0))

    hook = tiny_llama.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        evaluate(tiny_llama, random_windows(3, 5), variants={"a": nullcontext}, path="decode")
    finally:
        hook.remove()
    # What the last token's logits would say has no label.
    assert fed == [((1, 5), 0), *(((1, 1), held) for held in range(4))] * 3


def test_decoding_keeps_a_piece_of_logits(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        nonlocal most
        alive = [logits for ref in seen if (logits := ref()) is not None]
        most = max(most, sum(logits.shape[1] for logits in alive))
        seen.append(weakref.ref(output))

    hook = tiny_llama.lm_head.register_forward_hook(watch)
    length = 3 * PIECE_TOKENS
    try:
        evaluate(tiny_llama, random_windows(2, length), variants={"a": nullcontext}, path="decode")
    finally:
        hook.remove()
    # The unquantized model's, and the piece's but the newest.
    assert most == length + PIECE_TOKENS - 1


def test_a_change_in_the_middle_of_decoding_is_scored_there(tiny_llama: LlamaForCausalLM) -> None:
    position = PIECE_TOKENS + 5
    calls = 0

    def flat_once(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(logits) if calls == position + 1 else logits

    windows = random_windows(1, 2 * PIECE_TOKENS)
    _, decoded = evaluate(
        tiny_llama, windows, variants={"a": variant(tiny_llama, flat_once)}, path="decode"
    )
    with torch.no_grad():
        log_p = tiny_llama(windows).logits[0, position].double().log_softmax(-1)
    expected = (log_p.exp() * (log_p + torch.tensor(320.0).log())).sum()
    assert float(decoded.kl[0]) == pytest.approx(float(expected), rel=1e-4)


def test_poison_in_the_middle_of_decoding_names_variant_and_window(
    tiny_llama: LlamaForCausalLM,
) -> None:
    def broken(logits: Tensor) -> Tensor:
        logits[-1, 0, 5] = float("nan")
        return logits

    with pytest.raises(CalibrationError, match=r"broken gave NaN.*window 1"):
        evaluate(
            tiny_llama,
            random_windows(2, 20),
            variants={"broken": variant(tiny_llama, broken)},
            path="decode",
            batch_size=2,
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_logits_name_the_variant(tiny_llama: LlamaForCausalLM, poison: float) -> None:
    def broken(logits: Tensor) -> Tensor:
        logits[0, 3, 5] = poison
        return logits

    with pytest.raises(CalibrationError, match=r"broken gave NaN.*window 0") as caught:
        evaluate(
            tiny_llama, random_windows(2, 20), variants={"broken": variant(tiny_llama, broken)}
        )
    assert caught.value.hint
    with changed_head(tiny_llama, broken), pytest.raises(CalibrationError, match="unquantized"):
        evaluate(tiny_llama, random_windows(2, 20), variants={})


@pytest.mark.parametrize(
    ("windows", "options", "error"),
    [
        (torch.zeros(0, 10, dtype=torch.int64), {}, DataError),
        (torch.zeros(2, 1, dtype=torch.int64), {}, DataError),
        ([torch.zeros(9, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)], {}, DataError),
        (torch.zeros(2, 9, dtype=torch.int64), {"batch_size": 0}, ConfigError),
        (torch.zeros(2, 9, dtype=torch.int64), {"path": "decoded"}, ConfigError),
        (
            torch.zeros(2, 9, dtype=torch.int64),
            {"variants": {UNQUANTIZED: nullcontext}},
            ConfigError,
        ),
    ],
)
def test_bad_input(
    tiny_llama: LlamaForCausalLM, windows: Tensor, options: dict, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        evaluate(tiny_llama, windows, **{"variants": {}, **options})
    assert caught.value.hint


def test_the_model_is_left_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    evaluate(tiny_llama, random_windows(1, 10), variants={})
    assert tiny_llama.training
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


class Counter:
    """Hears of steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps = 0

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        self.stages.append((name, total))
        yield self.step

    def step(self) -> None:
        self.steps += 1


def test_progress_counts_forwards(tiny_llama: LlamaForCausalLM) -> None:
    counter = Counter()
    variants = {"a": nullcontext, "b": nullcontext}
    evaluate(tiny_llama, random_windows(5, 10), variants=variants, batch_size=2, progress=counter)
    assert counter.stages == [("evaluate", 9)]
    assert counter.steps == 9


def test_progress_of_decoding_moves_within_a_window(tiny_llama: LlamaForCausalLM) -> None:
    counter = Counter()
    seen: list[int] = []

    def watch(logits: Tensor) -> Tensor:
        seen.append(counter.steps)
        return logits

    evaluate(
        tiny_llama,
        # A window of 2 * PIECE_TOKENS + 1 tokens is decoded in two pieces, one more token in three.
        [random_windows(1, 2 * PIECE_TOKENS + extra)[0] for extra in (1, 2)],
        variants={"a": variant(tiny_llama, watch)},
        path="decode",
        progress=counter,
    )
    assert counter.stages == [("evaluate", 1 + 2 + 1 + 3)]
    assert counter.steps == 7
    first = [1] * PIECE_TOKENS + [2] * PIECE_TOKENS
    assert seen == first + [4] * PIECE_TOKENS + [5] * PIECE_TOKENS + [6]


class Garbage:
    """A codec whose codes say nothing of what was encoded."""

    sink_tokens = 1
    recent_tokens = 0
    rotated_keys = False

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        return keys.flip(1)

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        return values.flip(1)


def test_a_wrecked_cache_is_noticed(tiny_llama: LlamaForCausalLM) -> None:
    # Over more than four pages. The reversed text has the same numbers in the wrong places.
    windows = random_windows(1, 1024)
    _, four_bits, garbage = evaluate(
        tiny_llama,
        windows,
        variants={
            "4 bits": lambda: attach_codec(tiny_llama, HadamardInt(bits=4, layers=[0, 1])),
            "garbage": lambda: attach_codec(tiny_llama, Garbage([0, 1])),
        },
    )
    assert 0 < four_bits.mean_kl.mean < 0.1 * garbage.mean_kl.mean
    assert garbage.mean_agreement < four_bits.mean_agreement
