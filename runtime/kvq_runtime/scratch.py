"""Memory that comes and goes while a chunk of tokens passes through a model with a packed cache.

Layers run one after the other and are alike, but for the widths of their codes, so that the worst
moment of a layer of the largest widths is the worst of all: in its MLP, or in its attention, which
may have pages to pack first. Counted from the tensors that are alive then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_kernels import attention
from kvq_runtime.layer import ENCODED_BLOCK_BYTES, ENCODING_COPIES

if TYPE_CHECKING:
    import torch

    from kvq_runtime.implementation import ImplementationName

F32, I64 = 4, 8


def scratch_bytes(
    facts: Mapping[str, Any],
    config: KVQConfig,
    *,
    context: int,
    batch_size: int,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
    impl: ImplementationName,
) -> int:
    """Bytes beside weights and cache at the worst moment of reading ``chunk`` tokens of each row.

    Args:
        facts: the text model's configuration as a dict.
        config: of the sidecar; where layers differ its widths are the largest, which is enough for
            each of them.
        context: tokens a row that there is room for; no chunk is longer.
        batch_size: rows.
        chunk: tokens of a row in one forward.
        dtype: of the activations.
        device: where attention runs.
        impl: of attention.
    """
    shape = Fingerprint.from_config(facts)
    T = min(chunk, context)
    S, item = batch_size * T, dtype.itemsize
    # The residual stream, its norm, and in f32 what the norm is computed in.
    stream = S * shape.hidden_size * (2 * item + F32)
    mlp = 3 * S * _mlp_width(facts, shape.hidden_size) * item
    HQ, H, D = shape.num_attention_heads, shape.num_kv_heads, shape.head_dim
    # Queries, keys and values as projected, rotated queries, cosines and sines, the f32 output.
    attention = S * D * ((2 * HQ + 2 * H) * item + (HQ + 2) * F32)
    layer: dict[str, Any] = {
        "num_heads": HQ,
        "num_kv_heads": H,
        "head_dim": D,
        "window": config.sink_tokens + config.recent_tokens + PAGE_TOKENS,
        "tokens": T,
        "context": context,
        "itemsize": item,
    }
    if impl == "triton":
        attention += kernel_scratch_bytes(**layer, config=config, rows=batch_size, device=device)
    else:
        attention += layer_scratch_bytes(**layer)
    # Of each row's last token: as they are, in f32 for the sampler, which keeps scores and
    # probabilities, and sorted ones with their places.
    logits = batch_size * shape.vocab_size * (item + 4 * F32 + I64)
    # Token ids, mask and positions of all tokens, each beside its copy that is longer by one.
    bookkeeping = 3 * 2 * I64 * batch_size * context
    return max(stream + max(mlp, attention), logits) + bookkeeping


def layer_scratch_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    tokens: int,
    context: int,
    itemsize: int,
) -> int:
    """Bytes that a layer holds at its worst moment while ``tokens`` more tokens go through it.

    Either pages are packed, or attention runs; meanwhile the new tokens lie behind the tail of
    ``window`` tokens: as they are, in numbers of ``itemsize`` bytes, and their keys rotated in f32.
    One row of at most ``context`` tokens at a time.
    """
    H, D = num_kv_heads, head_dim
    exact = min(context, tokens + window if tokens > 1 else window)
    held = exact * H * D * (2 * itemsize if tokens > 1 else 0)
    page = 4 * H * PAGE_TOKENS * D
    most = min(context, tokens + window) // PAGE_TOKENS
    packing = min(max(1, ENCODED_BLOCK_BYTES // page), most) * page * ENCODING_COPIES
    attending = 4 * exact * H * D + attention.scratch_bytes(
        num_heads=num_heads,
        num_kv_heads=H,
        head_dim=D,
        tokens=tokens,
        coded_pages=context // PAGE_TOKENS,
        exact_tokens=min(exact, attention.QUERY_BLOCK + window),
    )
    return held + max(packing, attending)


def kernel_scratch_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    tokens: int,
    context: int,
    itemsize: int,
    config: KVQConfig,
    rows: int,
    device: torch.device,
) -> int:
    """As ``layer_scratch_bytes`` on Triton kernels, whose buffers stay: those of decoding count
    beside those of prefill, and all rows are decoded together.
    """
    from kvq_kernels import decode_buffers, pack, prefill

    H, D = num_kv_heads, head_dim
    shape = {"num_heads": num_heads, "num_kv_heads": H, "head_dim": D}
    pages = context // PAGE_TOKENS
    decoding = decode_buffers.scratch_bytes(
        config,
        **shape,
        batch=rows,
        max_pages=pages,
        exact_room=window,
        device=device,
    )
    if tokens == 1:
        return decoding
    exact = min(context, tokens + window)
    held = exact * H * D * 2 * itemsize
    most = min(context, tokens + window) // PAGE_TOKENS
    packing = pack.scratch_bytes(config, num_pages=most, num_kv_heads=H, head_dim=D)
    attending = 4 * exact * H * D + prefill.scratch_bytes(
        **shape, tokens=tokens, coded_pages=pages, exact_tokens=exact
    )
    return decoding + held + max(packing, attending)


def _mlp_width(facts: Mapping[str, Any], hidden: int) -> int:
    """Channels of the MLP that a token passes, those of its experts taken together."""
    dense = facts.get("intermediate_size") or facts.get("ffn_dim") or 4 * hidden
    experts = facts.get("num_experts_per_tok") or 0
    return int(max(dense, experts * (facts.get("moe_intermediate_size") or dense)))
