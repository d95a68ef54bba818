"""Decode attention over bf16 keys and values by everything that is installed.

torch's SDPA is asked in two ways, each on every backend: with ``enable_gqa``, and with the query
heads of a group as queries of one head, which is the same for one new token and lets every backend
read keys and values once a group. Repeated heads would read them once a query head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from gpu_timing import brief
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query ``[B, HQ, D]``, keys and values ``[B, H, T, D]`` to ``[B, HQ, D]``."""

NOT_INSTALLED = "not installed"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
MATH = {"math": SDPBackend.MATH}
"""What a CPU has."""


def decode_baselines(
    *, batch: int, group: int, device: torch.device
) -> Iterator[tuple[str, Attention | str]]:
    """Names and what runs, or why it does not."""
    for name, backend in (BACKENDS if device.type == "cuda" else MATH).items():
        yield f"sdpa {name}", partial(_grouped, backend)
        if group > 1:
            yield f"sdpa {name}, enable_gqa", partial(_gqa, backend)
    yield "flash-attn 3", _imported(_flash_attn, "flash_attn_interface")
    yield "flash-attn 2", _imported(_flash_attn, "flash_attn")
    if batch == 1:
        yield "flashinfer", _imported(_flashinfer, "flashinfer")
    else:
        yield "flashinfer", "not measured: its call for one row has no batches"


def _imported(make: Callable[[str], Attention], module: str) -> Attention | str:
    if find_spec(module) is None:
        return NOT_INSTALLED
    try:
        return make(module)
    # Such packages fail in many ways where they were built for another torch.
    except Exception as error:
        return f"installed, cannot be imported: {brief(error)}"


def _grouped(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    B, HQ, D = query.shape
    grouped = query.view(B, keys.shape[1], -1, D)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(grouped, keys, values).reshape(B, HQ, D)


def _gqa(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        output = scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
    return output[:, :, 0]


def _flash_attn(module: str) -> Attention:
    attend = import_module(module).flash_attn_with_kvcache
    # Lengths are on the device, as in a server, and making them is not what is timed.
    lengths: dict[tuple[int, int], Tensor] = {}

    def run(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        B, _, T, _ = keys.shape
        if (B, T) not in lengths:
            lengths[B, T] = torch.full((B,), T, dtype=torch.int32, device=keys.device)
        # Strides are read, so that this is a view.
        cached = (x.transpose(1, 2) for x in (keys, values))
        output = attend(query[:, None], *cached, cache_seqlens=lengths[B, T], causal=False)
        return (output[0] if isinstance(output, tuple) else output)[:, 0]

    return run


def _flashinfer(module: str) -> Attention:
    attend = import_module(module).single_decode_with_kv_cache

    def run(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Its matrix instructions pay for groups, its vector code for single heads.
        groups = query.shape[1] > keys.shape[1]
        output = attend(query[0], keys[0], values[0], kv_layout="HND", use_tensor_cores=groups)
        return output[None]

    return run


def dense_reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same in f32 by plain torch, head by head so that copies stay small."""
    B, HQ, D = query.shape
    H = keys.shape[1]
    grouped = query.float().view(B, H, -1, D)
    outputs = []
    for head in range(H):
        scores = grouped[:, head] @ keys[:, head].float().mT * D**-0.5
        outputs.append(scores.softmax(-1) @ values[:, head].float())
    return torch.stack(outputs, dim=1).reshape(B, HQ, D)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; NaN stays NaN and passes no bound."""
    difference = (found.float() - expected.float()).norm()
    return float(difference / expected.float().norm())
