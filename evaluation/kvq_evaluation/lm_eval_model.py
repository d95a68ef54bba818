"""A loaded model with a quantized cache, as lm_eval wants one; needs the extra ``eval``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from kvq_evaluation.perplexity import Variant
from kvq_formats.errors import ConfigError, DataError
from kvq_formats.progress import Progress
from kvq_runtime.offload import input_device

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[list[int], list[int]]
"""Tokens of a context, and of the continuation whose likelihood is asked for."""


@dataclass(frozen=True)
class CacheVariant:
    """One cache, by the two ways in which tasks use a model.

    Fields:
        name: of its rows.
        scoring: entered for requests of likelihoods: one forward over context and continuation.
        generating: entered for requests of text: ``model.generate``.
    """

    name: str
    scoring: Variant
    generating: Variant


class KVQLM(HFLM):
    """lm_eval's model of transformers, its cache chosen by the kind of request.

    Likelihoods are computed in f32 whatever the model's dtype is, and padding is masked: a codec
    must not spend outliers on it.

    Args:
        model, tokenizer: a causal language model, loaded, and a tokenizer, which stays as it is.
        variant: the cache.
        batch_size: texts a forward.
        progress: told of every request that has been answered.

    Fields:
        longest: by task, tokens of the longest text that a request gave or led to.
        truncated: by task, requests that lost tokens at their left end to fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        variant: CacheVariant,
        batch_size: int,
        progress: Progress,
    ) -> None:
        # A copy, for the base class gives it a padding token where it has none.
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=deepcopy(tokenizer),
            batch_size=batch_size,
        )
        self._device = input_device(model)
        self.variant = variant
        self.progress = progress
        self.longest: dict[str, int] = {}
        self.truncated: Counter[str] = Counter()
        self._answered: Callable[[], None] = lambda: None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Sum of log-likelihoods of each continuation, nats, and whether greedy gives it."""
        pairs = [self._pair(*request.args) for request in requests]
        for request, pair in zip(requests, pairs, strict=True):
            self._note(request, sum(map(len, pair)), most=self.max_length + 1)
        return self._scored(pairs)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Sum of log-likelihoods of each whole text, nats, in windows of the model's length."""
        owners: list[int] = []
        pairs: list[Pair] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            windows = get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                owners.append(owner)
                pairs.append(window)
            self._note(request, len(tokens) + 1)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._scored(pairs), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Text that follows each context, up to a stop string.

        Raises ConfigError for a task that leaves no room for its prompts.
        """
        rooms = [self._room(request) for request in requests]
        with self.variant.generating(), self._stage("generate", len(requests)):
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        for request, room, answer in zip(requests, rooms, answers, strict=True):
            prompt = len(self.tok_encode(request.args[0]))
            given = len(self.tok_encode(answer, add_special_tokens=False))
            self._note(request, prompt + given, most=room + given)
        return answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        texts: Tensor = super()._model_generate(context, max_length, stop, **options)
        for _ in texts:
            self._answered()
        return texts

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            pair: Pair = self._encode_pair(context, continuation)
            return pair
        tokens: list[int] = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _room(self, request: Instance) -> int:
        """Tokens of a prompt that fit beside those to be generated."""
        asked = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
        if asked >= self.max_length:
            raise ConfigError(
                f"the task {request.task_name} generates up to {asked} tokens, but the model has "
                f"{self.max_length} positions; nothing is left for a prompt.",
                hint="another task, or a model of a longer context",
            )
        return int(self.max_length - asked)

    def _note(self, request: Instance, tokens: int, *, most: int | None = None) -> None:
        """Keep what a task's row says of its texts' lengths."""
        name = request.task_name or ""
        if most is not None and tokens > most:
            self.truncated[name] += 1
            tokens = most
        self.longest[name] = max(self.longest.get(name, 0), tokens)

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood, nats, and greediness of every continuation, in order.

        The last token is only a label, so that continuations which differ in nothing else share a
        forward.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise DataError(
                    f"an answer of a task has {len(continuation)} tokens; the model has "
                    f"{self.max_length} positions.",
                    hint="another task, or a model of a longer context",
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            places.setdefault(tuple(tokens[:-1]), []).append(place)
        # Of like length together, and what needs the most memory first.
        texts = sorted(places, key=lambda text: (-len(text), text))
        scores: dict[int, tuple[float, bool]] = {}
        with self.variant.scoring(), self._stage("score", len(pairs)) as answered:
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                for text, logits in zip(batch, self._logits(batch), strict=True):
                    for place in places[text]:
                        scores[place] = _likelihood(logits[: len(text)], pairs[place][1])
                        answered()
        return [scores[place] for place in range(len(pairs))]

    def _logits(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """``[B, T, V]`` of one forward without a cache, padded to the right."""
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *([0] * (longest - len(text)))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        with torch.no_grad():
            output = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def _stage(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        stage: AbstractContextManager[Callable[[], None]]
        stage = self.progress.stage(f"{what} {self.variant.name}", total)
        with stage as self._answered:
            yield self._answered


def _likelihood(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of the tokens that the last rows of ``logits`` ``[T, V]`` predict."""
    labels = torch.tensor(continuation, device=logits.device)
    log_probabilities = logits[-len(labels) :].float().log_softmax(-1)
    of_labels = log_probabilities.gather(-1, labels[:, None])
    greedy = log_probabilities.argmax(-1)
    return float(of_labels.sum()), bool((greedy == labels).all())
