"""The loss of a causal language model, a few rows of its logits in fp32 at a time.

transformers turns all logits to fp32 and then holds their log-softmax, the gradient of it and the
gradient of the logits: three tensors of ``4 V`` bytes a token, 2.9 GiB at 2,048 tokens and a
vocabulary of 128,256. Rows do not depend on each other, so that here a chunk of rows goes from
logits to the gradient of logits before the next one starts. Gradients are the same to the last bit:
the same operations on the same rows. What a model does to its logits (soft-caps, scales) is its own
forward, which is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

CHUNK_NUMBERS = 2**22
"""Logits a chunk: 16 MiB in fp32, and four such tensors while a chunk is worked on."""
IGNORED = -100


def rows_a_chunk(vocab_size: int) -> int:
    """Tokens whose logits are in fp32 at once."""
    return max(1, CHUNK_NUMBERS // vocab_size)


@contextmanager
def loss_by_rows(model: PreTrainedModel, loss_scale: float) -> Iterator[None]:
    """Let ``model`` compute its loss a chunk of rows at a time while the context is open.

    A model with a loss of its own keeps it. ``loss_scale`` is what the loss of a token will be
    multiplied by before its gradient is taken; one in fp16 needs it early.
    """
    if model.loss_function is not ForCausalLMLoss:
        yield
        return

    def loss_function(
        logits: Tensor, labels: Tensor | None, vocab_size: int, **options: Any
    ) -> Tensor:
        if labels is None or any(value is not None for value in options.values()):
            return ForCausalLMLoss(logits, labels, vocab_size, **options)
        following = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
        rows = logits.view(-1, vocab_size)
        return _MeanLoss.apply(rows, following.to(logits.device), loss_scale)

    own = "_loss_function" in vars(model)
    before = model.loss_function
    model.loss_function = loss_function
    try:
        yield
    finally:
        model.loss_function = before
        if not own:
            del model._loss_function


class _MeanLoss(torch.autograd.Function):
    """Mean cross-entropy of logits ``[N, V]`` against i64 ``[N]``, f32, and its gradient at once.

    Expects to be differentiated with the number of predicted tokens times ``loss_scale``; any other
    factor is correct, too, and rounds once more.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, loss_scale: float) -> Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        count = rows_a_chunk(logits.shape[-1])
        for chunk, wanted, into in zip(
            logits.split(count), labels.split(count), gradient.split(count), strict=True
        ):
            with torch.enable_grad():
                rows = chunk.detach().float().requires_grad_(True)
                loss = nn.functional.cross_entropy(
                    rows, wanted, ignore_index=IGNORED, reduction="sum"
                )
                into.copy_(torch.autograd.grad(loss * loss_scale, rows)[0])
            total += loss.detach()
        ctx.gradient = gradient
        predicted = (labels != IGNORED).sum()
        ctx.factor = predicted * loss_scale
        return total / predicted

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None]:
        # Let go of: what hangs on the graph is there until all of the backward is done.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(given[0] / ctx.factor), None, None
