"""Models that are too large for a test, as configurations alone: nothing is ever loaded."""

from __future__ import annotations

from transformers import LlamaConfig, PreTrainedConfig

from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord
from kvq_runtime.resolve import ResolvedModel
from kvq_runtime.supported_models import text_config

LLAMA_3_8B_PARAMETERS = 8_030_261_248
"""As its model card on the Hub counts them."""


def described(config: PreTrainedConfig, *, name: str = "test/model") -> ResolvedModel:
    """What ``resolve_model`` would say of a repository with this configuration."""
    shape = Fingerprint.from_config(text_config(config))
    record = BaseModelRecord(id=name, revision=None, fingerprint=shape)
    return ResolvedModel(location=name, is_local=False, config=config, record=record)


def llama_3_8b() -> ResolvedModel:
    """meta-llama/Meta-Llama-3-8B."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return described(config, name="meta-llama/Meta-Llama-3-8B")
