"""Generation as such, on a stock cache; the tests of the command run it on a packed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from kvq_formats.errors import ConfigError, DataError
from kvq_runtime.generate import (
    Generation,
    GenerationInterrupted,
    encode_prompt,
    generate_text,
)
from kvq_runtime.sampling import Sampling

PROMPT = "they would go out of the house and see what it was"


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


Run = Callable[..., Generation]


@pytest.fixture
def run(tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Run:
    def generate(**options: Any) -> Generation:
        return generate_text(
            tiny_llama,
            tokenizer,
            encode_prompt(tokenizer, PROMPT),
            **{"cache": DynamicCache(), "max_new_tokens": 24, **options},
        )

    return generate


def test_what_transformers_itself_generates(
    run: Run, tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = encode_prompt(tokenizer, PROMPT)
    expected = tiny_llama.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    pieces: list[str] = []
    found = run(on_text=pieces.append)
    assert list(found.token_ids) == expected.tolist()
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == found.text
    # Piece by piece, not all at once.
    assert len(pieces) > 1
    assert found.prompt_tokens == ids.shape[1]
    assert found.prefill_seconds > 0
    assert found.decode_seconds > 0
    assert found.tokens_per_second == 23 / found.decode_seconds


def test_each_piece_is_there_before_the_next_token(run: Run, tiny_llama: LlamaForCausalLM) -> None:
    order: list[str] = []
    tiny_llama.register_forward_hook(lambda *_: order.append("forward"))
    run(on_text=lambda _: order.append("text"))
    assert order[0] == "forward"
    first = order.index("text")
    assert "forward" in order[first:]


def test_a_cache_that_is_passed_is_used(run: Run) -> None:
    cache = DynamicCache()
    found = run(cache=cache)
    # The last token is never fed.
    assert cache.get_seq_length() == found.prompt_tokens + 24 - 1


@pytest.mark.parametrize("chunk", [1, 5, 13, 512, None])
def test_chunks_of_the_prompt(run: Run, tiny_llama: LlamaForCausalLM, chunk: int | None) -> None:
    fed: list[int] = []
    tiny_llama.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = run(prefill_chunk=chunk)
    prompt = fed[: len(fed) - 23]
    assert sum(prompt) == found.prompt_tokens
    assert max(prompt) <= (chunk or found.prompt_tokens)
    assert len(prompt) == -(-found.prompt_tokens // (chunk or found.prompt_tokens))
    assert found.token_ids == run().token_ids


def test_progress_hears_of_chunks_and_not_of_decoding(
    run: Run, tiny_llama: LlamaForCausalLM
) -> None:
    heard: list[Any] = []

    class Listener:
        @contextmanager
        def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
            heard.append((name, total))
            yield lambda: heard.append("chunk")
            heard.append("closed")

    found = run(prefill_chunk=5, progress=Listener(), on_text=lambda _: heard.append("text"))
    chunks = -(-found.prompt_tokens // 5)
    before = heard[: heard.index("text")]
    assert before == [("prefill", chunks), *["chunk"] * chunks, "closed"]
    assert set(heard[len(before) :]) == {"text"}
    assert not tiny_llama._forward_hooks
    heard.clear()
    run(progress=Listener())
    assert heard == []


def test_it_stops_at_an_end_token(run: Run, tiny_llama: LlamaForCausalLM) -> None:
    ids = run().token_ids
    assert run().finish_reason == "length"
    tiny_llama.generation_config.eos_token_id = [ids[7], 319]
    found = run()
    assert found.token_ids == ids[: ids.index(ids[7]) + 1]
    assert found.finish_reason == "stop"
    tiny_llama.generation_config.eos_token_id = None
    tiny_llama.config.eos_token_id = None
    assert run().finish_reason == "length"


def test_end_tokens_are_no_text(run: Run, tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        # The likeliest token is always the end.
        tiny_llama.lm_head.weight.zero_()
        tiny_llama.lm_head.weight[1] = 0
    tiny_llama.generation_config.eos_token_id = 0
    found = run()
    assert (found.text, len(found.token_ids), found.finish_reason) == ("", 1, "stop")
    assert found.tokens_per_second is None


def test_sampling_is_a_matter_of_the_seed(run: Run) -> None:
    texts = [
        run(sampling=Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=seed)).token_ids
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert run(sampling=Sampling(seed=3)).token_ids == run(sampling=Sampling(seed=4)).token_ids


def test_a_repetition_penalty_changes_greedy_text(run: Run) -> None:
    plain, penalised = run(), run(sampling=Sampling(repetition_penalty=5.0))
    assert len(set(penalised.token_ids)) > len(set(plain.token_ids))


def test_the_prompt_may_hold_the_padding_token(
    tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_llama.generation_config.pad_token_id = 5
    ids = torch.tensor([[0, 9, 5, 12, 5, 7]])
    found = generate_text(
        tiny_llama, tokenizer, ids, cache=DynamicCache(), max_new_tokens=8, prefill_chunk=None
    )
    expected = tiny_llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert list(found.token_ids) == expected[0, 6:].tolist()


@pytest.mark.parametrize("where", ["text", "forward"])
def test_an_interrupt_keeps_what_is_there(
    run: Run, tiny_llama: LlamaForCausalLM, where: str
) -> None:
    whole = run()
    pieces: list[str] = []
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1
        if where == "forward" and forwards == 11:
            raise KeyboardInterrupt

    def show(piece: str) -> None:
        pieces.append(piece)
        if where == "text" and len(pieces) == 1:
            raise KeyboardInterrupt

    tiny_llama.register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(on_text=show)
    assert isinstance(caught.value, GenerationInterrupted)
    found = caught.value.generation
    assert found.finish_reason == "interrupted"
    assert 0 < len(found.token_ids) < 24
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    # Words that were not complete are handed on, too.
    assert "".join(pieces) == found.text != ""
    assert whole.text.startswith(found.text.rstrip("\ufffd"))
    assert found.prompt_tokens == whole.prompt_tokens


def test_an_interrupt_before_the_first_token(run: Run, tiny_llama: LlamaForCausalLM) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    hook = tiny_llama.register_forward_pre_hook(interrupted)
    with pytest.raises(GenerationInterrupted) as caught:
        run()
    found = caught.value.generation
    assert (found.text, found.token_ids, found.decode_seconds) == ("", (), 0)
    assert found.prefill_seconds > 0
    hook.remove()
    assert run().finish_reason == "length"


def test_a_reader_that_is_gone_is_not_written_to_again(run: Run) -> None:
    calls = 0

    def closed(_: str) -> None:
        nonlocal calls
        calls += 1
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(on_text=closed)
    assert calls == 1


def test_another_error_hands_on_the_text_before_it(run: Run, tiny_llama: LlamaForCausalLM) -> None:
    whole = run()
    pieces: list[str] = []
    forwards = 0

    def fail(*_: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 11:
            raise DataError("full")

    tiny_llama.register_forward_hook(fail)
    with pytest.raises(DataError, match="full"):
        run(on_text=pieces.append)
    assert whole.text.startswith("".join(pieces).rstrip("\ufffd"))
    assert "".join(pieces) != ""


def test_a_prompt_of_no_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="makes no token of the prompt ''"):
        encode_prompt(tokenizer, "")


def test_a_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    ids = encode_prompt(tokenizer, "the house", apply_chat_template=True)
    assert ids.shape[0] == 1
    assert tokenizer.decode(ids[0]) == "[user] the house [assistant]"


def test_a_chat_template_that_is_missing_or_broken(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="has no chat template") as caught:
        encode_prompt(tokenizer, PROMPT, apply_chat_template=True)
    assert caught.value.hint == "leave --apply-chat-template out"
    tokenizer.chat_template = "{{ raise_exception('only with a system turn') }}"
    with pytest.raises(ConfigError, match=r"cannot be filled in: only with a system turn\."):
        encode_prompt(tokenizer, PROMPT, apply_chat_template=True)
