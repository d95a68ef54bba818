"""What a Llama's projections give and what the loss says of it, by plain hooks and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq_runtime.rope import attention_modules

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Projected:
    """One layer on windows ``[B, T]``.

    Fields:
        queries, keys, values: f32 ``[B, T, heads, D]``, before RoPE.
        key_gradient, value_gradient: ``[B, T, H, D]``, of the loss summed over all tokens.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    key_gradient: Tensor
    value_gradient: Tensor


def projected(model: LlamaForCausalLM, ids: Tensor) -> dict[int, Projected]:
    """Run ``ids`` int64 ``[B, T]`` forth and back, without taps, recomputation or scaling."""
    outputs: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, attention in attention_modules(model).items():
        for name in ("q_proj", "k_proj", "v_proj"):

            def keep(_m: Any, _a: Any, out: Tensor, place: tuple[int, str] = (index, name)) -> None:
                out.retain_grad()
                outputs[place] = out

            handles.append(getattr(attention, name).register_forward_hook(keep))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss * ids[:, 1:].numel()).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    head_dim = model.config.head_dim

    def heads(x: Tensor | None) -> Tensor:
        assert x is not None
        return x.detach().unflatten(-1, (-1, head_dim))

    return {
        index: Projected(
            *(heads(outputs[index, name]) for name in ("q_proj", "k_proj", "v_proj")),
            *(heads(outputs[index, name].grad) for name in ("k_proj", "v_proj")),
        )
        for index in attention_modules(model)
    }
