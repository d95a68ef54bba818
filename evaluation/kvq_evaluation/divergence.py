"""How far a variant's next-token distribution is from the unquantized model's, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ENTRIES = 2**20
"""Entries of a temporary: 4 MiB in f32, 8 tokens of a vocabulary of 128k."""


@dataclass(frozen=True)
class TokenMetrics:
    """What each scored token says.

    Fields:
        nll: f64 ``[T]``, negative log-likelihood of the label under the variant, nats.
        kl: f64 ``[T]``, KL(reference || variant), nats. Rounding may leave it a little below 0; it
            is not clamped, which would bias a mean.
        agrees: bool ``[T]``, whether both put the same token first.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor


def token_metrics(reference_logits: Tensor, logits: Tensor, labels: Tensor) -> TokenMetrics:
    """Compare two models on the same tokens.

    Args:
        reference_logits: ``[T, V]``, any float dtype, of the unquantized model.
        logits: ``[T, V]``, any float dtype, of the variant.
        labels: int64 ``[T]``, the token that came next.

    Differences and exponentials are taken in f32, sums over the vocabulary in f64, in chunks of
    tokens, so that no temporary has more than ``max(V, CHUNK_ENTRIES)`` entries. With ``R`` the
    widest range of a row of logits and ``d`` the largest difference between the two, a KL is off by
    at most ``2**-23 * (R + 4) * (1 + d)``; for identical logits it is 0 exactly. An entry of
    probability 0 adds nothing, so vocabularies padded with ``-inf`` are fine. NaN in, NaN out.
    """
    tokens, vocabulary = logits.shape
    if reference_logits.shape != logits.shape or labels.shape != (tokens,):
        raise ValueError(
            f"reference logits {tuple(reference_logits.shape)}, logits {tuple(logits.shape)} and "
            f"labels {tuple(labels.shape)} should be [T, V], [T, V] and [T]"
        )
    rows = max(1, CHUNK_ENTRIES // vocabulary)
    nll, kl, agrees = [], [], []
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        p, q = reference_logits[part].float(), logits[part].float()
        p_exp, p_sum, p_log, p_first = _exponentials(p)
        _, _, q_log, q_first = _exponentials(q)
        # NaN stands where a probability of 0 met an infinite difference, and that adds nothing; a
        # logit that was NaN has made its log-partition NaN as well.
        weighted = p_exp.mul_(p - q).nansum(dim=-1, dtype=torch.float64)
        kl.append(weighted / p_sum - (p_log - q_log))
        label_logits = q.gather(-1, labels[part, None].to(q.device)).squeeze(-1)
        nll.append(q_log - label_logits.double())
        agrees.append(p_first == q_first)
    return TokenMetrics(nll=torch.cat(nll), kl=torch.cat(kl), agrees=torch.cat(agrees))


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``exp(logits - max)`` of f32 ``[T, V]``, and what comes along.

    Returns the exponentials f32 ``[T, V]``, their sum f64 ``[T]``, the log-partition f64 ``[T]``
    and the index of the largest logit int64 ``[T]``. The maximum is taken off first so that nothing
    overflows and shifted logits give the same.
    """
    top, first = logits.max(dim=-1, keepdim=True)
    exponentials = (logits - top).exp_()
    total = exponentials.sum(dim=-1, dtype=torch.float64)
    return exponentials, total, top.squeeze(-1).double() + total.log(), first.squeeze(-1)
