"""Generate text with ``model.generate`` and hand it on piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, TextStreamer

from kvq_formats.errors import ConfigError, DataError
from kvq_formats.progress import Progress, SilentProgress
from kvq_runtime.cache_argument import cache_name
from kvq_runtime.model_errors import first_line
from kvq_runtime.offload import input_device
from kvq_runtime.sampling import Sampling, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

PREFILL_CHUNK = 512
"""Prompt tokens a forward pass."""


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Fields:
        text: the new text, without special tokens.
        token_ids: the new tokens, a final end token included.
        prompt_tokens: tokens of the prompt.
        finish_reason: ``stop`` at an end token, ``length`` at the limit, ``interrupted``.
        prefill_seconds: wall clock until the first token was there.
        decode_seconds: wall clock from the first token to the last.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length", "interrupted"]
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first by wall clock; None where there are none."""
        after_first = len(self.token_ids) - 1
        return after_first / self.decode_seconds if after_first > 0 else None


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C while text was generated; ``generation`` is what was there by then."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self.generation = generation


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, *, apply_chat_template: bool = False
) -> Tensor:
    """Token ids of a prompt, int64 ``[1, T]``.

    ``apply_chat_template`` makes it the user's turn of a conversation, as the model was trained.

    Raises ConfigError where the tokenizer has no chat template or a broken one, DataError where no
    token comes out.
    """
    if apply_chat_template:
        turns = [{"role": "user", "content": text}]
        ids = _conversation(tokenizer, turns)
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[-1] == 0:
        raise DataError(
            f"the tokenizer makes no token of the prompt {text[:40]!r}.", hint="another prompt"
        )
    return ids.to(torch.int64)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    *,
    cache: Cache,
    max_new_tokens: int,
    prefill_chunk: int | None = PREFILL_CHUNK,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Generation:
    """Continue a prompt; inside ``kvq.attach`` this runs on the packed cache that is passed.

    Args:
        model, tokenizer: a causal language model, and what made its tokens.
        input_ids: the prompt, int64 ``[1, T]``.
        cache: an empty cache that the model can use.
        max_new_tokens: at most so many tokens are generated.
        prefill_chunk: prompt tokens a forward; None reads the prompt in one piece.
        sampling: greedy without.
        on_text: hears each piece of new text as soon as its words are complete.
        progress: hears of the prompt's chunks.

    Raises:
        GenerationInterrupted: Ctrl-C, once generation has begun; the text so far has been handed
            on, and is in the exception.
        CacheFullError: more tokens than the cache was made for.
    """
    sampling = sampling or Sampling()
    prompt_tokens = input_ids.shape[-1]
    stream = _Stream(tokenizer, on_text=on_text)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        prefill_chunk_size=prefill_chunk,
        use_cache=True,
        num_beams=1,
        num_return_sequences=1,
        **sampling.options(),
    )
    input_ids = input_ids.to(input_device(model))
    chunks = 1 if prefill_chunk is None else -(-prompt_tokens // prefill_chunk)
    with ExitStack() as stack:
        stack.callback(stream.finish)
        try:
            stack.enter_context(seeded(model, sampling.seed))
            stack.enter_context(_heard(model, stream, progress or SilentProgress(), chunks))
            model.generate(
                input_ids,
                # Told, not inferred: a prompt may hold the padding token.
                attention_mask=torch.ones_like(input_ids),
                **{cache_name(GenerationMixin.prepare_inputs_for_generation): cache},
                generation_config=config,
                streamer=stream,
            )
        except KeyboardInterrupt as interrupt:
            stream.finish()
            raise GenerationInterrupted(
                stream.generation(prompt_tokens, finish_reason="interrupted")
            ) from interrupt
    stopped = not _end_tokens(model).isdisjoint(stream.token_ids[-1:])
    return stream.generation(prompt_tokens, finish_reason="stop" if stopped else "length")


class _Stream(TextStreamer):
    """Keeps tokens, text and times, and hands complete words on."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, on_text: Callable[[str], None] | None
    ) -> None:
        # Cleaning up would take back blanks that were handed on already.
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.token_ids: list[int] = []
        self.text = ""
        self.on_first_token: Callable[[], object] | None = None
        self._on_text = on_text
        self._deaf = False
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started

    def put(self, value: Tensor) -> None:
        """Take in the prompt, then each token."""
        if not self.next_tokens_are_prompt:
            self._last = time.perf_counter()
            if self._first is None:
                self._first = self._last
                if self.on_first_token is not None:
                    self.on_first_token()
            self.token_ids += value.reshape(-1).tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep a piece of text and hand it on."""
        if not text:
            return
        self.text += text
        if self._on_text is None or self._deaf:
            return
        try:
            self._on_text(text)
        except Exception:
            # Whoever cannot take text must not be given the rest at the end.
            self._deaf = True
            raise

    def finish(self) -> None:
        """Hand on what waits for the end of its word; does nothing the second time."""
        self.end()

    def generation(
        self, prompt_tokens: int, *, finish_reason: Literal["stop", "length", "interrupted"]
    ) -> Generation:
        now = time.perf_counter()
        first = now if self._first is None else self._first
        return Generation(
            text=self.text,
            token_ids=tuple(self.token_ids),
            prompt_tokens=prompt_tokens,
            finish_reason=finish_reason,
            prefill_seconds=first - self._started,
            decode_seconds=max(0.0, self._last - first),
        )


@contextmanager
def _heard(
    model: PreTrainedModel, stream: _Stream, progress: Progress, chunks: int
) -> Iterator[None]:
    """Let ``progress`` hear of each chunk of the prompt; a single one is not worth a stage."""
    if chunks < 2:
        yield
        return
    with ExitStack() as stage:
        done = stage.enter_context(progress.stage("prefill", chunks))
        hook = model.register_forward_hook(lambda *_: done())
        stage.callback(hook.remove)
        # Decoding is a matter of the text that appears.
        stream.on_first_token = stage.close
        yield


def _conversation(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> Tensor:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model's tokenizer has no chat template: it was not trained on conversations.",
            hint="leave --apply-chat-template out",
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise ConfigError(
            f"the model's chat template cannot be filled in: {first_line(error)}",
            hint="leave --apply-chat-template out",
        ) from error
    ids: Tensor = encoded["input_ids"]
    return ids


def _end_tokens(model: PreTrainedModel) -> set[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        return set()
    return set(found) if isinstance(found, list | tuple) else {found}
