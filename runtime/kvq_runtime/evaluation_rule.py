"""The evaluation rule: a plain forward that attends over decoded keys and values.

Every key and value except the sinks and each query's own last ``recent_tokens`` is read as its
codes decode, the query's own page included. That is stricter than decoding ever is, and it is what
all accuracy figures use (``docs/method.md``; result rows say ``path: prefill``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime.rope import AttentionCall, AttentionTap, tap_attention
from kvq_runtime.rotary_channels import key_before_rope

QUERY_BLOCK = 256
"""Queries that the banded attention scores at a time."""


class CacheCodec(Protocol):
    """A way to quantize a cache: what decoding the codes of one row's tokens gives.

    Fields:
        layers: indices of the layers that are quantized.
        sink_tokens: first attended tokens of a row, kept exact.
        recent_tokens: length of each query's exact band, itself included.
        rotated_keys: whether keys are quantized after RoPE (True) or before (False).
    """

    @property
    def layers(self) -> Collection[int]: ...

    @property
    def sink_tokens(self) -> int: ...

    @property
    def recent_tokens(self) -> int: ...

    @property
    def rotated_keys(self) -> bool: ...

    def decoded_keys(self, layer_idx: int, keys: Tensor) -> Tensor:
        """Keys f32 ``[H, T, D]`` of one row after its sinks -> what their codes decode to."""
        ...

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        """Values f32 ``[H, T, D]`` of one row after its sinks -> what their codes decode to."""
        ...


@runtime_checkable
class QueryAwareCodec(CacheCodec, Protocol):
    """A codec that spends its bits by what queries attend to."""

    def decoded_pair(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a row's codes after its sinks decode to, both at once.

        Args:
            queries: f32 ``[HQ, T, D]`` after RoPE.
            keys: f32 ``[H, T, D]``, after RoPE or before it, as ``rotated_keys`` says.
            values: f32 ``[H, T, D]``.
        """
        ...


class EvaluationTap(AttentionTap):
    """Replaces keys and values by what ``codec`` decodes them to.

    Args:
        codec: the cache.
        own_page: a query reads its own page of 256 tokens exactly, as under the runtime rule.
    """

    def __init__(self, codec: CacheCodec, *, own_page: bool = False) -> None:
        self.codec = codec
        self.own_page = own_page
        self.mask: Tensor | None = None

    def on_forward(self, arguments: Mapping[str, Any]) -> None:
        """Learn which tokens are attended; refuse what the rule does not cover."""
        past = arguments.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise KVQError(
                "the evaluation rule needs the whole text in one forward, but the cache already "
                f"holds {int(past.get_seq_length())} tokens.",
                hint="call model(input_ids) on the whole text, without past_key_values",
            )
        mask = arguments.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise KVQError(
                f"attention_mask has {mask.dim()} dimensions; the evaluation rule takes a padding "
                "mask [batch, tokens] or none."
            )
        self.mask = mask.bool() if mask is not None and not mask.bool().all() else None

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend over decoded keys and values."""
        layer_idx, exact_key, value = call.layer_idx, call.key, call.value
        if layer_idx not in self.codec.layers:
            return call.attend(call.query, exact_key, value)
        if self.codec.rotated_keys:
            key, decoded_value = self._decoded_pair(call, exact_key)
        else:
            # Decoded before RoPE, then rotated as the model does.
            before = key_before_rope(call)
            decoded, decoded_value = self._decoded_pair(call, before.key)
            key = before.rotated(decoded)
        if self.codec.recent_tokens == 0 and not self.own_page:
            return call.attend(call.query, key, decoded_value)
        order = self._attended(call.query).cumsum(-1) - 1
        output = partly_exact_attention(
            call.query,
            (key, decoded_value),
            (exact_key, value),
            exact_until=self._exact_until(order),
            order=order,
            mask=self.mask,
            options=call.options,
        )
        return output, None

    def _exact_until(self, order: Tensor) -> Tensor:
        """The last query, by order, that reads each token exactly; ``order`` int64 ``[B, T]``."""
        recent = self.codec.recent_tokens
        if not self.own_page:
            return order + recent - 1
        page = (order - self.codec.sink_tokens).clamp(min=0) // PAGE_TOKENS
        return self.codec.sink_tokens + PAGE_TOKENS * (page + 1) - 1 + recent

    def _attended(self, query: Tensor) -> Tensor:
        """Bool ``[B, T]``, which tokens are no padding."""
        B, _, T, _ = query.shape
        if self.mask is None:
            return torch.ones(B, T, dtype=torch.bool, device=query.device)
        return self.mask.to(query.device)

    def _decoded_pair(self, call: AttentionCall, key: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded keys, from ``key`` ``[B, H, T, D]``, and values, the sinks as they are."""
        layer_idx, codec = call.layer_idx, self.codec
        if not isinstance(codec, QueryAwareCodec):
            return (
                self._decoded(layer_idx, key, codec.decoded_keys),
                self._decoded(layer_idx, call.value, codec.decoded_values),
            )
        keys, values = key.clone(), call.value.clone()
        for row, attended in enumerate(self._attended(call.query)):
            tokens = attended.nonzero()[codec.sink_tokens :, 0]
            if len(tokens):
                restored = codec.decoded_pair(
                    layer_idx, *(x[row, :, tokens].float() for x in (call.query, key, call.value))
                )
                keys[row, :, tokens], values[row, :, tokens] = (x.to(key.dtype) for x in restored)
        return keys, values

    def _decoded(
        self, layer_idx: int, x: Tensor, decode: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """``[B, H, T, D]`` with every token but the sinks decoded, row by row."""
        decoded = x.clone()
        for row, exact in enumerate(x):
            if self.mask is None:
                tokens = torch.arange(x.shape[2], device=x.device)
            else:
                tokens = self.mask[row].to(x.device).nonzero()[:, 0]
            tokens = tokens[self.codec.sink_tokens :]
            if len(tokens):
                restored = decode(layer_idx, exact[:, tokens].float())
                decoded[row, :, tokens] = restored.to(x.dtype)
        return decoded


def partly_exact_attention(
    query: Tensor,
    decoded: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    *,
    exact_until: Tensor,
    order: Tensor,
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> Tensor:
    """Causal attention that reads each query's near tokens from the exact pair.

    Args:
        query: ``[B, HQ, T, D]``; decoded, exact: (key, value) ``[B, H, T, D]`` after RoPE.
        exact_until: int64 ``[B, T]``, the last query that reads a token exactly, by its order.
        order: int64 ``[B, T]``, place of each token among the attended ones of its row.
        mask: bool ``[B, T]``, attended tokens, or None for all.
        options: the model's attention options; scaling and softcap are honoured, others refused.

    Returns: ``[B, T, HQ, D]`` in the query's dtype.

    Raises: UnsupportedModelError for learned sinks, windows shorter than the text, and dropout.
    """
    B, HQ, T, D = query.shape
    window = options.get("sliding_window")
    refused = {
        "s_aux": options.get("s_aux") is not None,
        "head_mask": options.get("head_mask") is not None,
        "dropout": bool(options.get("dropout")),
        "sliding_window": window is not None and window < T,
    }
    for name, given in refused.items():
        if given:
            raise UnsupportedModelError(
                f"attention option {name} is not supported together with recent tokens.",
                hint="calibrate with --recent-tokens 0",
            )
    groups = HQ // decoded[0].shape[1]
    key, value, exact_key, exact_value = (
        x.float().repeat_interleave(groups, dim=1) for x in (*decoded, *exact)
    )
    scaling = options.get("scaling") or D**-0.5
    softcap = options.get("softcap")
    attended = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    attended = attended.to(query.device)
    places = torch.arange(T, device=query.device)
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, T))
        near = (order[:, rows, None] <= exact_until[:, None, :])[:, None]
        q = query[:, :, rows].float() * scaling
        scores = torch.where(near, q @ exact_key.mT, q @ key.mT)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = (places[rows, None] >= places[None, :]) & attended[:, None, :]
        scores = scores.masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        weights = scores.softmax(-1)
        outputs.append(
            weights.masked_fill(near, 0.0) @ value + weights.masked_fill(~near, 0.0) @ exact_value
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype).contiguous()


@contextmanager
def attach_codec(
    model: PreTrainedModel,
    codec: CacheCodec,
    *,
    rule: Literal["evaluation", "runtime"] = "evaluation",
) -> Iterator[PreTrainedModel]:
    """Make plain ``model(input_ids)`` attend over what ``codec`` decodes; restored on exit.

    Under the runtime rule a query reads pages of 256 tokens that ended before it from codes, and
    its own page exactly. What it sees depends on its place alone, so that one forward over a text
    gives what decoding it token by token would give. Batches may be padded (``attention_mask``
    ``[B, T]``): padding enters no page.
    """
    with tap_attention(model, EvaluationTap(codec, own_page=rule == "runtime")):
        yield model
