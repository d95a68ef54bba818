"""What a configuration says: which layers are quantized, and what cannot be served at all.

Whether kvq understands what a model does with its keys is tried out, see ``examine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXAMPLE = "MODEL is a decoder with rotary embeddings: Llama, Qwen, Mistral, Phi-3, Gemma, ..."

FIXED_TYPES = frozenset(
    {"sliding_attention", "chunked_attention", "linear_attention", "conv", "mamba", "moe", "mlp"}
)
"""Layer types whose cache does not grow beyond a window, or that have none."""


def text_config(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The configuration of the text decoder as a dict, under the names that transformers shares."""
    decoder = config.get_text_config(decoder=True)
    facts: dict[str, Any] = decoder.to_dict()
    for shared, own in decoder.attribute_map.items():
        if own in facts:
            facts.setdefault(shared, facts[own])
    return facts


def quantized_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers whose cache is quantized: those that attend to the whole context.

    Layers with a sliding window or a recurrent state hold a cache that does not grow, and keep it.
    A window as long as the model's positions hides nothing and counts as full attention. Where all
    layers have a window, all are quantized, and serve texts within it (``context_limit``). Raises
    UnsupportedModelError if no layer is left.
    """
    types = layer_types(config)
    layers = tuple(index for index, name in enumerate(types) if name == "full_attention")
    if layers:
        return layers
    window = context_limit(config)
    if window is not None and window > PAGE_TOKENS:
        return tuple(range(len(types)))
    names = ", ".join(sorted(set(types)))
    subject = f"none of the {len(types)} layers of this {config.model_type} model"
    if set(types) - FIXED_TYPES:
        raise UnsupportedModelError(
            f"{subject} is of a type that kvq knows how to quantize ({names}).", hint=EXAMPLE
        )
    within = "" if window is None else f"; windows of {window} tokens hold no page of {PAGE_TOKENS}"
    raise UnsupportedModelError(
        f"{subject} attends to the whole context ({names}): its cache does not grow, and there is "
        f"nothing to quantize{within}.",
        hint=EXAMPLE,
    )


def context_limit(config: PreTrainedConfig) -> int | None:
    """Tokens that a quantized cache can serve: the window, where every layer has the same one."""
    if set(layer_types(config)) != {"sliding_attention"}:
        return None
    from kvq_runtime.stock_layers import types_and_options

    _, options = types_and_options(config)
    windows = {given["sliding_window"] for given in options}
    return int(windows.pop()) if len(windows) == 1 else None


def layer_types(config: PreTrainedConfig) -> list[str]:
    """One name a layer, as transformers makes caches by; windows that hide nothing count as full.

    Raises UnsupportedModelError where the configuration gives none.
    """
    from kvq_runtime.stock_layers import types_and_options

    decoder = config.get_text_config(decoder=True)
    positions = getattr(decoder, "max_position_embeddings", None)
    try:
        types, options = types_and_options(config)
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"transformers makes no cache of layers for models of type {config.model_type} "
            f"({error}).",
            hint=EXAMPLE,
        ) from error

    def name_of(kind: str, window: int | None) -> str:
        hides = bool(window) and not (positions and window and window >= positions)
        if kind == "attention" or (kind == "sliding_attention" and not hides):
            return "full_attention"
        return kind

    return [
        name_of(kind, given.get("sliding_window"))
        for kind, given in zip(types, options, strict=True)
    ]


def check_supported(config: PreTrainedConfig, *, name: str) -> None:
    """Raise UnsupportedModelError if kvq does not understand the model called ``name``."""
    for reason in _reasons_against_class(config):
        raise UnsupportedModelError(f"{name} {reason}.", hint=EXAMPLE)
    facts = text_config(config)
    for reason in chain(_reasons_against_layers(config), _reasons_against_attention(facts)):
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


def _reasons_against_layers(config: PreTrainedConfig) -> Iterator[str]:
    try:
        layers = list(getattr(config.get_text_config(decoder=True), "per_layer_config", None) or ())
    except AttributeError:
        # No number of layers: reading the fingerprint says so.
        return
    for field in ("head_dim", "num_key_value_heads"):
        sizes = {getattr(layer, field, None) for layer in layers}
        if len(sizes) > 1:
            found = ", ".join(sorted(map(str, sizes)))
            yield f"has layers whose caches differ in shape ({field} is {found})"


def _reasons_against_attention(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts.get("kv_lora_rank") is not None:
        yield (
            "uses multi-head latent attention (MLA, kv_lora_rank in its configuration), which "
            "caches one latent vector a token instead of keys and values"
        )
    if facts.get("num_kv_shared_layers") or "reuse" in (facts.get("kv_sharing_modes") or ()):
        yield "shares one cache among several layers"
    if facts.get("alibi"):
        yield "has ALiBi position biases instead of rotary embeddings"
    fingerprint = Fingerprint.from_config(facts)
    for other in ("v_head_dim", "global_head_dim"):
        if facts.get(other) not in (None, fingerprint.head_dim):
            sizes = f"head_dim {fingerprint.head_dim}, {other} {facts[other]}"
            yield f"has vectors of two sizes ({sizes})"
