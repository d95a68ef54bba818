"""The evaluation rule: a plain forward that attends over decoded keys and values.

Every key and value except the sinks and each query's own last ``recent_tokens`` is read as its
codes decode, the query's own page included. That is stricter than decoding ever is, and it is what
all accuracy figures use (``docs/method.md``; result rows say ``path: prefill``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

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


class EvaluationTap(AttentionTap):
    """Replaces keys and values by what ``codec`` decodes them to."""

    def __init__(self, codec: CacheCodec) -> None:
        self.codec = codec
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
            key = self._decoded(layer_idx, exact_key, self.codec.decoded_keys)
        else:
            # Decoded before RoPE, then rotated as the model does.
            before = key_before_rope(call)
            decoded = self._decoded(layer_idx, before.key, self.codec.decoded_keys)
            key = before.rotated(decoded)
        decoded_value = self._decoded(layer_idx, value, self.codec.decoded_values)
        if self.codec.recent_tokens == 0:
            return call.attend(call.query, key, decoded_value)
        output = banded_attention(
            call.query,
            (key, decoded_value),
            (exact_key, value),
            band=self.codec.recent_tokens,
            mask=self.mask,
            options=call.options,
        )
        return output, None

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


def banded_attention(
    query: Tensor,
    decoded: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    *,
    band: int,
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> Tensor:
    """Causal attention that reads each query's last ``band`` tokens from the exact pair.

    Args:
        query: ``[B, HQ, T, D]``; decoded, exact: (key, value) ``[B, H, T, D]`` after RoPE.
        band: tokens up to and including the query itself that are read exactly.
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
    order = attended.cumsum(-1)
    places = torch.arange(T, device=query.device)
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, T))
        near = (order[:, rows, None] - order[:, None, :] < band)[:, None]
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
def attach_codec(model: PreTrainedModel, codec: CacheCodec) -> Iterator[PreTrainedModel]:
    """Make plain ``model(input_ids)`` attend over what ``codec`` decodes; restored on exit.

    Batches may be padded (``attention_mask`` ``[B, T]``): padding enters no page.
    """
    with tap_attention(model, EvaluationTap(codec)):
        yield model
