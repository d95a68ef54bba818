"""Random Llamas whose cache is what is measured: attention of a real shape, all else small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvq_calibration.pipeline import calibrate
from kvq_formats.config import KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.parameters import KeyParameters
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar

if TYPE_CHECKING:
    from gpu_shapes import Shape

VOCABULARY = 256
SHAPE = "32 query heads, 8 KV heads of 128"
"""The attention of Llama-3-8B."""

OUTLIER_SHARE_DEVIATIONS = 2.5758
"""Half-range of a normal channel in standard deviations, where 1 % lies outside."""


def random_llama(*, layers: int, positions: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with the attention of ``SHAPE`` and a hidden size, MLP and vocabulary of toys."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=positions,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def random_llama_like(shape: Shape, *, positions: int, device: torch.device) -> LlamaForCausalLM:
    """A whole model of ``shape`` in bf16, made where it is used; f32 for the interpreter."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        attn_implementation="sdpa",
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.eval()


def random_ids(batch: int, tokens: int, *, seed: int = 0) -> Tensor:
    """Token ids int64 ``[batch, tokens]``."""
    return torch.randint(VOCABULARY, (batch, tokens), generator=_generator(seed))


def calibrated(model: LlamaForCausalLM, *, bits: int) -> Sidecar:
    """A sidecar with the default options, calibrated on random ids."""
    return calibrate(
        model,
        random_ids(1, 1024, seed=1),
        KVQConfig(key_bits=bits, value_bits=bits, sensitivity="none"),
        base_model=BaseModelRecord(
            id="random", revision=None, fingerprint=Fingerprint.from_config(model.config.to_dict())
        ),
        calibration=CalibrationRecord(
            dataset="random", revision=None, num_samples=1, seq_len=1024, seed=1, token_sha256="0"
        ),
    )


def random_states(
    parameters: KeyParameters, tokens: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Normal keys (before RoPE) and values ``[1, H, tokens, D]`` of which 1 % are outliers."""
    H, D = parameters.center.shape
    generator = _generator(seed)
    keys, values = (torch.randn(1, H, tokens, D, generator=generator) for _ in range(2))
    half_range = parameters.half_range[:, None] / OUTLIER_SHARE_DEVIATIONS
    return (keys * half_range + parameters.center[:, None]).to(dtype), values.to(dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
