"""A small model of the same make, on which kvq tries what it is about to do to a large one.

Whether a model can be served depends on what its code does with keys, values, masks and positions,
and that depends on its configuration: layer types, RoPE, caps, sinks. A miniature keeps all of it,
and every layer, and has random weights; what it has less of are heads, hidden channels, experts and
vocabulary. It is made from the configuration alone, before any weights are read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvq_formats.errors import UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint
from kvq_runtime.quiet import quiet_transformers
from kvq_runtime.supported_models import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
LARGEST_BYTES = 4 * 2**30
"""A miniature that would be larger is none."""

SMALLER: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"vocab_size(_per_layer_input)?", lambda size: min(size, VOCABULARY)),
    (r".*(intermediate|ffn|feed_forward|mlp|expert).*_(size|dim)|n_inner", lambda n: min(n, 64)),
    (r"n_group|topk_group|num_expert_groups?", lambda n: min(n, 1)),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_moe_experts", lambda n: min(n, 4)),
    (r".*experts_per_tok(en)?|.*top_?k.*|moe_k|num_selected_experts", lambda n: min(n, 2)),
    (r"linear_num_(key|value)_heads", lambda n: min(n, 2)),
    (r".*_token_id", lambda token: token % VOCABULARY),
)
"""Fields of configurations that attention does not depend on, and what a miniature makes of them.

By the words that configurations share, not by family. A field that is missed makes a miniature
larger, or keeps it from being built, which is said.
"""


def make_miniature(
    config: PreTrainedConfig,
    *,
    name: str,
    model_class: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of the same make as ``config`` says, small, random, in f32 on the CPU.

    Args:
        config: of the model, or of the composite model whose text decoder is meant.
        name: for messages.
        model_class: of a model that is loaded already; without it, what transformers would choose.
        trust_remote_code: as for ``from_pretrained``.

    Raises UnsupportedModelError where it cannot be built. The random state stays as it was.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        small = copy.deepcopy(config)
        decoder = small.get_text_config(decoder=True)
        _shrink(decoder)
        _shrink_towers(small, decoder)
        if model_class is None and type(decoder) in MODEL_FOR_CAUSAL_LM_MAPPING:
            # The text model alone, without the towers for images and sound.
            small = decoder
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)
            options: dict[str, Any] = {"dtype": torch.float32}
            if model_class is not None:
                _check_size(model_class, small, options)
                model = model_class._from_config(small, **options)
            else:
                options["trust_remote_code"] = trust_remote_code
                _check_size(AutoModelForCausalLM, small, options)
                model = AutoModelForCausalLM.from_config(small, **options)
            _fill(model)
    except UnsupportedModelError:
        raise
    # Whatever somebody's model code raises: it is their class that could not be built.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UnsupportedModelError(
            f"{name} cannot be tried before its weights are loaded: a small model of its "
            f"configuration ({config.model_type}) cannot be built ({type(error).__name__}: "
            f"{first_line})."
        ) from error
    return model.eval()


def _shrink(config: PreTrainedConfig) -> None:
    """Fewer heads, channels, experts and words; everything that attention depends on stays."""
    facts = text_config(config)
    shape = Fingerprint.from_config(facts)
    heads, group = min(shape.num_kv_heads, 2), shape.num_attention_heads // shape.num_kv_heads
    queries = heads * min(group, 2)
    sizes = {
        "num_attention_heads": queries,
        "num_key_value_heads": heads,
        # What divides hidden channels by heads, and what reads head_dim, find the same.
        "hidden_size": queries * shape.head_dim,
        "head_dim": shape.head_dim,
    }
    for field, size in sizes.items():
        if hasattr(config, field) and getattr(config, field) != size:
            setattr(config, field, size)
    _shrink_mamba(config, sizes["hidden_size"])
    _shrink_fields(config)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            if getattr(part, "hidden_size", None) == shape.hidden_size:
                part.hidden_size = sizes["hidden_size"]
            _shrink_fields(part)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _shrink_fields(config: PreTrainedConfig) -> None:
    # Words of the vocabulary first: a configuration may compare them with its size.
    ordered = sorted(config.to_dict().items(), key=lambda item: item[0].startswith("vocab"))
    for field, value in ordered:
        for pattern, smaller in SMALLER:
            if re.fullmatch(pattern, field):
                setattr(config, field, _each(value, smaller))
                break


def _shrink_mamba(config: PreTrainedConfig, hidden_size: int) -> None:
    """Recurrent layers have as many heads as their share of the hidden channels takes."""
    expand, head = getattr(config, "mamba_expand", None), getattr(config, "mamba_d_head", None)
    if isinstance(expand, int) and isinstance(head, int) and hasattr(config, "mamba_n_heads"):
        config.mamba_n_heads = expand * hidden_size // head
        config.mamba_n_groups = 1


def _shrink_towers(config: PreTrainedConfig, decoder: PreTrainedConfig) -> None:
    """One layer of whatever reads images and sound: it is not asked to."""
    for name in config.sub_configs:
        tower = getattr(config, name, None)
        if tower is None or tower is decoder:
            continue
        for field in ("num_hidden_layers", "num_layers", "num_blocks", "depth"):
            if isinstance(getattr(tower, field, None), int):
                setattr(tower, field, 1)


def _each(value: Any, smaller: Callable[[int], int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return smaller(value)
    if isinstance(value, list | tuple):
        return type(value)(_each(entry, smaller) for entry in value)
    return value


def _check_size(maker: Any, config: PreTrainedConfig, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        build = getattr(maker, "_from_config", None) or maker.from_config
        model = build(config, **options)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > LARGEST_BYTES:
        raise UnsupportedModelError(
            f"a small model of type {config.model_type} would still take {size / 2**30:.1f} GiB; "
            "its configuration has sizes that kvq does not know."
        )


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    """Random weights of a size at which attention is neither flat nor a single token."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(noise * 1.2 * parameter.shape[-1] ** -0.5)
        else:
            # Norms and biases: about what they were made with.
            parameter.add_(noise * 0.15)
    embedding = model.get_input_embeddings().weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
