"""What one decoder layer holds while a batch passes through it forth and back.

Everything is counted a token, in numbers of the model's type (``s`` bytes each), for weights that
are frozen, so that linear layers keep nothing for the backward pass. Symbols: ``h`` hidden size,
``i`` width of the feed-forward, ``Q = HQ*D`` channels of the queries, ``C = H*D`` of the keys,
``k`` experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvq_formats.fingerprint import Fingerprint
from kvq_runtime.rope import attention_modules
from kvq_runtime.supported_models import text_config

POSITIONS = 32
"""Bytes a token of ids, positions and what is computed with them, i64."""
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")
EXPERT_WIDTH = ("moe_intermediate_size", "expert_intermediate_size")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")


@dataclass(frozen=True)
class LayerShape:
    """Widths of the layers of a model, the largest where they differ.

    Fields:
        hidden, query, channels: h, Q, C.
        query_heads: HQ.
        feed_forward: i; of experts, all that a token goes through together; half of it without a
            gate, where there is an activation and no product.
        experts: k; 0 where there are none.
        bias: i again where experts add biases to their rows, which are gathered for it; else 0.
        cut: channels of a key that are kept a second time, where only a part goes through RoPE.
        norms: channels that go through a norm in one layer, each of which keeps its input in fp32.
        head_dim: D; softcap: whether scores of attention go through a tanh, which is kept.
        sinks: whether scores are joined with a sink's; their softmax is not in fp32 then, and kept
            with it and without it.
        kept: channels that the storages of one layer's keys and values have; more than 2 C where
            one projection makes queries, keys and values.
    """

    hidden: int
    query: int
    channels: int
    query_heads: int
    feed_forward: int
    experts: int
    norms: int
    kept: int
    cut: int
    bias: int
    head_dim: int
    softcap: bool
    sinks: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> LayerShape:
        """Read off the configuration and the modules of a model, which may be on ``meta``."""
        given = text_config(model.config)
        shape = Fingerprint.from_config(given)
        HQ, D = shape.num_attention_heads, shape.head_dim
        Q, C = HQ * D, shape.num_kv_heads * D
        h = int(given["hidden_size"])
        dense = int(given.get("intermediate_size") or 4 * h)
        experts = _first(given, EXPERTS_A_TOKEN) or 0
        width = _first(given, EXPERT_WIDTH) or dense
        shared = _first(given, SHARED_WIDTH) or width * (_first(given, ("n_shared_experts",)) or 0)
        through = max(experts * width + shared, dense) if experts else dense
        parameters = dict(model.named_parameters())
        linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        if not experts and not any("gate" in name for name in linears):
            through = -(-through // 2)
        attentions = attention_modules(model)
        names = {module: name for name, module in model.named_modules()}
        layers = {names[module].rpartition(".")[0] for module in attentions.values()}
        norms = max(
            (
                sum(_norm_channels(part, name, h=h, Q=Q, C=C) for name, part in _norms(layer))
                for layer in map(model.get_submodule, layers)
            ),
            default=0,
        )
        fused = any(
            isinstance(part, nn.Linear) and part.out_features >= Q + 2 * C
            for attention in attentions.values()
            for part in attention.modules()
        )
        return cls(
            hidden=h,
            query=Q,
            channels=C,
            query_heads=HQ,
            feed_forward=through,
            experts=experts,
            norms=norms,
            kept=Q + 2 * C if fused else 2 * C,
            cut=C if _rotates_a_part(given) else 0,
            bias=through if any(name.endswith("up_proj_bias") for name in parameters) else 0,
            head_dim=D,
            softcap=bool(given.get("attn_logit_softcapping")),
            sinks=any(name.endswith(".sinks") for name in parameters),
        )

    def forward_bytes(self, s: int, *, tokens: int, seq_len: int, eager: bool) -> int:
        """The worst moment of a forward without gradients, or under gradient checkpointing.

        All the while: embeddings, cosines and sines. On top of that the largest of: the norm
        (residual, and input, square, product in fp32, and the result); attention (residual; query,
        its two halves, key and value twice, output), to which an implementation that writes scores
        down adds them, masked, and their softmax in fp32 (with sinks: joined, without their
        largest, and their softmax, in ``s``); the feed-forward (residual, input and
        output; gate and up, the activation, the product; scores that were written down are let go
        of behind it only); experts (their rows gathered, put out, weighted and put back in order,
        and where each row belongs, i64). Experts with biases clamp, too: five more of their
        width.
        """
        h, i, k = self.hidden, self.feed_forward, self.experts
        scores = self.query_heads * seq_len if eager else 0
        copies = 3 * s if self.sinks else 2 * s + (6 if s < 4 else 0)
        written = scores * copies
        indices = 64 * k
        moments = (
            s * 8 * h,
            s * (3 * h + (6 if eager else 4) * self.query + 2 * self.channels) + written,
            s * (4 * i + 5 * self.bias + (4 + k) * h + scores) + indices,
            s * ((3 + (5 if s == 4 else 6) * k) * h + scores) + indices if k else 0,
        )
        return tokens * (s * (h + 4 * self.head_dim) + POSITIONS + max(moments))

    def backward_bytes(self, s: int, *, tokens: int, seq_len: int, eager: bool, far: bool) -> int:
        """The worst moment of recomputing a layer and taking its gradients.

        Kept all the while: cosines and sines; the input of each norm in fp32; two residuals, and of
        attention its query, rotated key, value and output, and where scores are written down their
        softmax, in fp32 and in ``s`` (with sinks in ``s`` alone, twice), and the tanh of a
        soft-cap. On top of that the largest of: the feed-forward (gate, up and activation, and
        their gradients); experts (the same, and rows gathered and put out; or the gradients of
        these, on their way back into order; with biases what they gather, clamp and multiply, too,
        seven widths); a norm's gradient, five numbers in fp32; attention (gradients of all that it
        keeps).

        For ``far`` gradients (``far_gradients``) query and key before RoPE are kept, too, and there
        is one more moment, when gradients have come to the output of attention and the residual.
        Attention has run once more: its rotated key, and its output, twice; of scores that are
        written down the same as above, and two gradients. Of pages there are the gradients at key
        and value that were found, the sum and the last page's, two masked gradients of the output,
        and on the way to the next those of query, key and value, all as wide as queries, and of a
        key before RoPE, three times.
        """
        h, i, k = self.hidden, self.feed_forward, self.experts
        scores = self.query_heads * seq_len if eager else 0
        copies = 5 if s == 4 else 6
        both = 2 * s if self.sinks else 4 + (s if s < 4 else 0)
        backwards = 2 * s if self.sinks else 2 * 4
        in_fp32 = 4 * self.norms if s < 4 else 0
        kept = s * (2 * h + 2 * self.query + 2 * self.channels + 4 * self.head_dim) + in_fp32
        saved = scores * (both + (s if self.softcap else 0))
        kept += saved + (s * (self.query + self.channels) if far else 0)
        once_more = s * (h + 8 * self.query + 8 * self.channels + 2 * self.cut) + saved
        indices = 64 * k
        moments = (
            s * (6 * i + 3 * self.bias + 2 * k * h) + indices,
            s * (3 * i + 7 * self.bias + (copies * k + 6) * h) + indices if k else 0,
            5 * 4 * h,
            s * 2 * (self.query + self.channels) + scores * (4 + s),
            once_more + scores * backwards if far else 0,
        )
        return tokens * (kept + max(moments))


def scores_are_written(implementation: str | None) -> bool:
    """Whether an implementation of attention holds ``[B, HQ, T, T]``; sdpa and flash do not."""
    return implementation is None or "eager" in implementation


def _first(given: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (given.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _rotates_a_part(given: Mapping[str, Any]) -> bool:
    rope = given.get("rope_parameters") or {}
    factor = rope.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0
    return isinstance(factor, int | float) and factor < 1


def _norms(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in layer.named_modules():
        if "norm" in type(part).__name__.lower() and not any(True for _ in part.children()):
            yield name, part


def _norm_channels(norm: nn.Module, name: str, *, h: int, Q: int, C: int) -> int:
    """Channels of a token that go through a norm of a layer: all, or those of query or key."""
    last = name.rpartition(".")[2]
    if "." not in name or last[:1] not in "qk":
        return h
    return Q if last[0] == "q" else C
