from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from kvq_formats.errors import UnsupportedModelError
from kvq_runtime.supported_models import (
    check_supported,
    context_limit,
    quantized_layers,
    text_config,
)


def make_config(model_type: str, **options: Any) -> Any:
    return CONFIG_MAPPING[model_type](**options)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {}),
        ("olmo2", {}),
        ("gpt_neox", {}),
        ("mistral", {"sliding_window": None}),
        ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 1]}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 32}),
        ("gpt_oss", {}),
        ("gemma3", {}),
        ("smollm3", {}),
        ("cohere2", {}),
        ("phi", {}),
        ("dbrx", {}),
        ("mistral", {"sliding_window": 4096}),
        ("llama", {"architectures": ["LlamaForCausalLM"]}),
    ],
)
def test_decoders_are_understood(model_type: str, options: dict[str, Any]) -> None:
    check_supported(make_config(model_type, **options), name="org/model")


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("bert", {}, "not a causal language model"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, r"language model \(BertForMaskedLM\)"),
        ("vit", {"architectures": ["ViTForImageClassification"]}, "ViTForImageClassification"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "not a causal"),
        ("t5", {"architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
        ("whisper", {}, "is an encoder-decoder"),
        ("deepseek_v3", {}, r"latent attention \(MLA"),
        ("mamba", {}, "has no num_attention_heads"),
        ("bamba", {}, "nothing to quantize"),
        ("falcon_h1", {}, r"that kvq knows how to quantize \(hybrid\)"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("gemma3n_text", {}, "shares one cache"),
        ("gemma4_text", {}, "caches differ in shape .*head_dim is 256, 512"),
        ("mimo_v2_flash", {}, "vectors of two sizes"),
        ("mistral", {"sliding_window": 256}, "windows of 256 tokens hold no page of 256"),
    ],
)
def test_others_are_refused(model_type: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        check_supported(make_config(model_type, **options), name="org/model")
    if "num_attention_heads" not in message:
        assert "Llama" in (caught.value.hint or "")


def test_all_layers_of_a_plain_decoder() -> None:
    assert quantized_layers(make_config("llama", num_hidden_layers=3)) == (0, 1, 2)
    assert quantized_layers(make_config("qwen3", num_hidden_layers=2)) == (0, 1)


def test_only_layers_that_see_everything() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = make_config("gemma2", num_hidden_layers=4, layer_types=types, sliding_window=128)
    assert quantized_layers(config) == (1, 3)
    hybrid = ["linear_attention", "linear_attention", "full_attention"]
    config = make_config("qwen3_next", num_hidden_layers=3, layer_types=hybrid)
    assert quantized_layers(config) == (2,)


def test_the_text_layers_of_a_composite_model() -> None:
    text = {"num_hidden_layers": 6, "sliding_window": 64}
    assert quantized_layers(make_config("gemma3", text_config=text)) == (5,)


def test_where_every_layer_has_a_window_all_are_quantized_within_it() -> None:
    config = make_config("mistral", sliding_window=4096, max_position_embeddings=32768)
    assert quantized_layers(config) == tuple(range(32))
    assert context_limit(config) == 4096
    assert context_limit(make_config("llama")) is None
    mixed = make_config("gemma2", num_hidden_layers=4, sliding_window=300)
    assert context_limit(mixed) is None


def test_names_of_other_families_are_read_as_transformers_shares_them() -> None:
    facts = text_config(make_config("gpt2", n_head=4, n_embd=64))
    assert (facts["num_attention_heads"], facts["hidden_size"]) == (4, 64)


def test_a_window_that_hides_nothing_counts_as_full() -> None:
    config = make_config(
        "mistral", num_hidden_layers=2, sliding_window=4096, max_position_embeddings=4096
    )
    assert quantized_layers(config) == (0, 1)
    assert quantized_layers(make_config("mistral", num_hidden_layers=2, sliding_window=None)) == (
        0,
        1,
    )
