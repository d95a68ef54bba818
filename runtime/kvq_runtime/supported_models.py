"""Which models kvq understands, and which of their layers it quantizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvq_formats.errors import UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXAMPLE = "MODEL is a decoder with rotary embeddings: Llama, Qwen, Mistral, Phi-3, Gemma, ..."

STATE_SPACE_KEYS = frozenset(
    {"layers_block_type", "attn_layer_indices", "attn_layer_period", "block_types"}
)
"""Keys by which configurations mix attention with recurrent layers without ``layer_types``."""

ROPE_ON_SLIDING_LAYERS = frozenset(
    {"afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"}
)
"""Families whose sliding layers rotate their keys and whose full layers do not."""

ROPE_ON_PART_OF_A_KEY = frozenset({"persimmon", "phi", "stablelm"})
"""Families that split keys before the rotary function and rotate one part."""

NORM_AFTER_ROPE = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})
"""Families whose k-norm follows RoPE: keys before RoPE are not what attention reads, rotated."""


def text_config(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The configuration of the text decoder as a dict."""
    facts: dict[str, Any] = config.get_text_config(decoder=True).to_dict()
    return facts


def quantized_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers whose cache is quantized: those that attend to the whole context.

    Layers with a sliding window or a recurrent state hold a cache that does not grow, and keep it.
    A window as long as the model's positions hides nothing and counts as full attention. Raises
    UnsupportedModelError if no layer is left.
    """
    facts = text_config(config)
    types = _layer_types(facts)
    layers = tuple(index for index, name in enumerate(types) if name == "full_attention")
    if not layers:
        names = ", ".join(sorted(set(types)))
        raise UnsupportedModelError(
            f"none of the {len(types)} layers of this {facts.get('model_type')} model attends to "
            f"the whole context ({names}): its cache does not grow, and there is nothing to "
            "quantize.",
            hint=EXAMPLE,
        )
    return layers


def check_supported(config: PreTrainedConfig, *, name: str) -> None:
    """Raise UnsupportedModelError if kvq does not understand the model called ``name``."""
    for reason in _reasons_against_class(config):
        raise UnsupportedModelError(f"{name} {reason}.", hint=EXAMPLE)
    facts = text_config(config)
    for reason in _reasons_against_attention(facts):
        raise UnsupportedModelError(f"{name} {reason}.", hint=EXAMPLE)
    quantized_layers(config)


def _reasons_against_class(config: PreTrainedConfig) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or []
    what = ", ".join(architectures) or f"type {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        yield f"is an encoder-decoder ({what}); kvq needs a decoder alone"
    causal = {
        entry
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for entry in ([names] if isinstance(names, str) else names)
    }
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or has_own_code
    generates = any(
        entry in causal or entry.endswith(("ForCausalLM", "LMHeadModel")) for entry in architectures
    )
    if not known or (architectures and not generates) or _is_encoder(config):
        yield f"is not a causal language model ({what})"


def _is_encoder(config: PreTrainedConfig) -> bool:
    # GPT-NeoX has the flag too, off by default, and is a decoder all the same.
    return (
        getattr(config, "is_decoder", None) is False
        and not config.model_type.startswith("gpt")
        and not config.architectures
    )


def _reasons_against_attention(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts.get("kv_lora_rank") is not None:
        yield (
            "uses multi-head latent attention (MLA, kv_lora_rank in its configuration), which "
            "caches one latent vector a token instead of keys and values"
        )
    if facts.get("num_attention_heads") is None and facts.get("n_head") is None:
        yield f"has no attention layers (type {facts.get('model_type')})"
    if facts.get("layer_types") is None and (
        facts.keys() & STATE_SPACE_KEYS or any(key.startswith("mamba_") for key in facts)
    ):
        yield "mixes attention with recurrent layers in a way that kvq does not know"
    if facts.get("num_kv_shared_layers") or "reuse" in (facts.get("kv_sharing_modes") or ()):
        yield "shares one cache among several layers"
    if facts.get("model_type") == "llama4_text":
        yield "rotates its keys as complex numbers (Llama 4)"
    yield from _reasons_against_rope(facts)
    if facts.get("alibi"):
        yield "has ALiBi position biases instead of rotary embeddings"
    fingerprint = Fingerprint.from_config(facts)
    for other in ("v_head_dim", "global_head_dim"):
        if facts.get(other) not in (None, fingerprint.head_dim):
            sizes = f"head_dim {fingerprint.head_dim}, {other} {facts[other]}"
            yield f"has vectors of two sizes ({sizes})"
    if fingerprint.rope == {"rope_type": "none"}:
        yield "has no rotary position embeddings"


def _reasons_against_rope(facts: Mapping[str, Any]) -> Iterator[str]:
    model_type = facts.get("model_type")
    # SmolLM3 lists a layer with RoPE as 1 and one without as 0.
    unrotated = 0 in (facts.get("no_rope_layers") or ())
    if unrotated or (model_type in ROPE_ON_SLIDING_LAYERS and facts.get("sliding_window")):
        yield f"has layers without RoPE that attend to the whole context (type {model_type})"
    if model_type in ROPE_ON_PART_OF_A_KEY:
        yield f"rotates a part of each key apart from the rest (type {model_type})"
    if model_type in NORM_AFTER_ROPE:
        yield f"normalises its keys after RoPE (type {model_type})"


def _layer_types(facts: Mapping[str, Any]) -> list[str]:
    count = Fingerprint.from_config(facts).num_hidden_layers
    positions = facts.get("max_position_embeddings")

    def hides(window: int | None) -> bool:
        return bool(window) and not (positions and window and window >= positions)

    window = facts.get("sliding_window")
    if facts.get("use_sliding_window") is False:
        window = None
    if facts.get("layer_types"):
        names = {"attention": "full_attention"}
        if not hides(window):
            names["sliding_attention"] = "full_attention"
        return [names.get(name, name) for name in facts["layer_types"]]
    if hides(window):
        return ["sliding_attention"] * count
    if hides(facts.get("attention_chunk_size")):
        return ["chunked_attention"] * count
    return ["full_attention"] * count
