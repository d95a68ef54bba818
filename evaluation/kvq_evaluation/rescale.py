"""Outlier channels on demand: rescale a model's heads without changing what it computes.

Large models have key and value channels that are many times wider than the rest; small ones may
not. A key channel may be widened if the query's is narrowed by as much, and a value channel if the
output projection's columns are: attention sees the same numbers, the cache does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvq_formats.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def outlier_channels(
    model: PreTrainedModel,
    *,
    key_pairs: int,
    value_channels: int,
    factor: float = 8.0,
    seed: int = 0,
) -> Iterator[PreTrainedModel]:
    """Widen channels of every layer by ``factor`` inside the context; restore them on exit.

    Args:
        model: a Llama-like model: separate q, k, v and o projections, rotate-half RoPE over the
            whole head, no q-norm or k-norm.
        key_pairs: rotary pairs ``(j, j + D/2)`` a KV head. Both channels of a pair are scaled
            alike, so that RoPE turns the scaled pair as it turned the plain one.
        value_channels: channels a KV head.
        factor: a power of two, so that nothing is rounded and the model's logits stay the same to
            the bit, barring overflow and subnormal numbers.
        seed: draws the channels, for each layer and head anew.

    Raises UnsupportedModelError for another architecture, ConfigError for a factor that is not a
    positive power of two or more channels than a head has.
    """
    head_dim = _head_dim(model)
    if factor <= 0 or torch.frexp(torch.tensor(factor, dtype=torch.float64))[0] != 0.5:
        raise ConfigError(f"factor is {factor}, expected a power of two.", hint="take 8")
    if not (0 <= key_pairs <= head_dim // 2 and 0 <= value_channels <= head_dim):
        raise ConfigError(
            f"{key_pairs} key pairs and {value_channels} value channels a head are asked for; "
            f"a head has {head_dim // 2} and {head_dim}.",
            hint="ask for fewer",
        )
    layers = _projections(model)
    originals = [(p, p.detach().clone()) for layer in layers for p in layer.parameters()]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for layer in layers:
                for head in range(layer.k.out_features // head_dim):
                    pairs = torch.randperm(head_dim // 2, generator=generator)[:key_pairs]
                    keys = torch.cat([pairs, pairs + head_dim // 2])
                    values = torch.randperm(head_dim, generator=generator)[:value_channels]
                    _widen_head(layer, head, head_dim, keys, values, factor)
        yield model
    finally:
        with torch.no_grad():
            for parameter, original in originals:
                parameter.copy_(original)


@dataclass(frozen=True)
class _Projections:
    """The four linear maps of one attention layer."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    def parameters(self) -> Iterator[nn.Parameter]:
        for projection in (self.q, self.k, self.v, self.o):
            yield from projection.parameters()


def _widen_head(
    layer: _Projections, head: int, head_dim: int, keys: Tensor, values: Tensor, factor: float
) -> None:
    """Scale one KV head's channels (int64 ``[n]``, within the head) and all that reads them."""
    _scale_outputs(layer.k, head * head_dim + keys, factor)
    _scale_outputs(layer.v, head * head_dim + values, factor)
    group = layer.q.out_features // layer.k.out_features
    for query_head in range(head * group, (head + 1) * group):
        _scale_outputs(layer.q, query_head * head_dim + keys, 1 / factor)
        layer.o.weight[:, query_head * head_dim + values] *= 1 / factor


def _scale_outputs(projection: nn.Linear, channels: Tensor, factor: float) -> None:
    projection.weight[channels] *= factor
    if projection.bias is not None:
        projection.bias[channels] *= factor


def _projections(model: PreTrainedModel) -> list[_Projections]:
    found = []
    for module in model.modules():
        if not hasattr(module, "k_proj"):
            continue
        maps = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
        linear = [projection for projection in maps if isinstance(projection, nn.Linear)]
        if len(linear) == len(maps) and not hasattr(module, "q_norm"):
            found.append(_Projections(*linear))
    if len(found) != model.config.get_text_config().num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(found)} layers with separate q, k, v and o "
            "projections and no norm on queries and keys, expected all.",
            hint="rescale a Llama-like model",
        )
    return found


def _head_dim(model: PreTrainedModel) -> int:
    """Channels of a head; raises UnsupportedModelError unless RoPE turns all of them."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    frequencies = [m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")]
    if not frequencies or any(2 * len(inv_freq) != head_dim for inv_freq in frequencies):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not turn whole heads of {head_dim} channels by RoPE.",
            hint="rescale a Llama-like model",
        )
    return int(head_dim)
