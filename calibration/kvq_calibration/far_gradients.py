"""Gradients that reach keys and values through queries of later pages: what decoding is damaged by.

While it decodes, a query reads its own page exactly and older pages from codes (the runtime rule).
Most of the loss's gradient at a key comes from queries nearby, which never see that key's code, so
that sensitivity to a deployed cache is another one than KVQuant's (section 3.3), which the
evaluation rule measures. Rows of queries reach keys independently of each other: masking the
gradient of the attention's output to later rows leaves what comes through them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.capture import KeyValueTap
from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.rope import AttentionCall
from kvq_runtime.rotary_channels import key_before_rope


def has_far_queries(tokens: int, *, sink_tokens: int) -> bool:
    """Whether a window of ``tokens`` has queries beyond its first page."""
    return tokens > sink_tokens + PAGE_TOKENS


@dataclass
class FarGradientTap(KeyValueTap):
    """A ``KeyValueTap`` that also finds, in a backward, gradients through queries of later pages.

    Fields:
        recomputed: whether layers run once more in the backward (gradient checkpointing). Then the
            attention of that run is looked at, so that no queries are kept until it.
        sink_tokens: tokens before the first page.
        far: by layer index, after a backward: gradients at keys before RoPE and at values,
            ``[B, H, T, D]`` in the model's dtype; 0 in the sinks and in the last page. Empty where
            windows end with their first page.
    """

    recomputed: bool = True
    sink_tokens: int = 1
    far: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _attention: dict[int, AttentionCall] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Collection[int], *, sink_tokens: int) -> Self:
        """For these layers of ``model``, under ``sensitivity.activation_gradients``."""
        recomputed = bool(model.supports_gradient_checkpointing)
        return cls(layers=layers, recomputed=recomputed, sink_tokens=sink_tokens)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend as the model does, and wait for the gradient of what comes out."""
        output, weights = super().on_attention(call)
        wanted = call.layer_idx in self.layers and has_far_queries(
            call.query.shape[2], sink_tokens=self.sink_tokens
        )
        if not wanted:
            return output, weights
        if self.recording == (not self.recomputed):
            self._attention[call.layer_idx] = call
        if self.recording and output.requires_grad:
            # Of the call only its layer: a hook lives as long as the loss does.
            layer_idx = call.layer_idx
            output.register_hook(lambda gradient: self._on_gradient(layer_idx, gradient))
        return output, weights

    def start(self) -> None:
        """Forget the last batch and record the next forward."""
        super().start()
        self.far.clear()
        self._attention.clear()

    def _on_gradient(self, layer_idx: int, gradient: Tensor) -> None:
        self.far[layer_idx] = _far_gradients(
            self._attention.pop(layer_idx), gradient, sink_tokens=self.sink_tokens
        )


def _far_gradients(
    call: AttentionCall, gradient: Tensor, *, sink_tokens: int
) -> tuple[Tensor, Tensor]:
    """Gradients at keys before RoPE and at values, through queries of later pages only.

    ``gradient`` is that of the attention's output, ``[B, T, HQ, D]``.
    """
    before = key_before_rope(call)
    T = call.query.shape[2]
    with torch.enable_grad():
        key = before.key.detach().requires_grad_()
        value = call.value.detach().requires_grad_()
        output, _ = call.attend(call.query.detach(), before.rotated(key), value)
    at_key, at_value = torch.zeros_like(key), torch.zeros_like(value)
    for first in range(sink_tokens, T - PAGE_TOKENS, PAGE_TOKENS):
        page = slice(first, first + PAGE_TOKENS)
        later = gradient.clone()
        later[:, : page.stop] = 0
        found = torch.autograd.grad(output, (key, value), later, retain_graph=True)
        at_key[:, :, page], at_value[:, :, page] = (x[:, :, page] for x in found)
    return at_key.detach(), at_value.detach()
