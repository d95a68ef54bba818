"""The families that kvq is tested with: one table, for the tests and for ``docs/models.md``.

Each is a tiny random model of transformers' own code; what is special about its attention is kept,
and named. The table is no list of what works: anything that behaves like one of these does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiny_models import make_tiny_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 2048
WINDOW = 64
"""Of layers with a sliding window: much shorter than the texts of the tests."""

ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Fields:
        title: what people call it.
        model_type: as transformers names it.
        hub_ids: models that people run.
        attention: what is special about it.
        options: of the tiny configuration.
        quantized: indices of its layers that are packed, of two.
        rotary_channels: of those layers, (start, stop) among 16 channels; all where it is not here.
    """

    title: str
    model_type: str
    hub_ids: tuple[str, ...]
    attention: str
    options: dict[str, Any] = field(default_factory=dict)
    quantized: tuple[int, ...] = (0, 1)
    rotary_channels: dict[int, tuple[int, int]] = field(default_factory=dict)

    def make(self, **overrides: Any) -> PreTrainedModel:
        """The tiny model, f32: 2 layers, 4 query heads on 2 KV heads of 16 channels."""
        return make_tiny_family(
            self.model_type, **{"max_position_embeddings": POSITIONS, **self.options, **overrides}
        )


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Configuration of RoPE of another kind than the default one."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


LONG = {
    "short_factor": [1.0 + 0.05 * pair for pair in range(8)],
    "long_factor": [2.0 + pair for pair in range(8)],
    "original_max_position_embeddings": 1024,
    "factor": 2.0,
}

FAMILIES: dict[str, Family] = {
    family.title: family
    for family in (
        Family(
            "Llama 1 and 2",
            "llama",
            ("huggyllama/llama-7b", "meta-llama/Llama-2-7b-hf"),
            "as many KV heads as query heads",
            {"num_key_value_heads": 4},
        ),
        Family(
            "Llama 3.x",
            "llama",
            (
                "meta-llama/Llama-3.1-8B",
                "meta-llama/Llama-3.2-1B",
                "meta-llama/Llama-3.3-70B-Instruct",
            ),
            "grouped KV heads; RoPE scaled by wavelength (llama3)",
            rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=512,
            ),
        ),
        Family(
            "Mistral",
            "mistral",
            ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-Nemo-Base-2407"),
            "grouped KV heads",
        ),
        Family(
            "Mistral with a sliding window",
            "mistral",
            ("mistralai/Mistral-7B-v0.1",),
            "a window in every layer: packed, for texts within the window",
            {"sliding_window": 1024},
        ),
        Family(
            "Mixtral",
            "mixtral",
            ("mistralai/Mixtral-8x7B-v0.1",),
            "mixture of experts",
            {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        Family(
            "Qwen2 and Qwen2.5",
            "qwen2",
            ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"),
            "biases of queries, keys and values",
        ),
        Family("Qwen3", "qwen3", ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"), "k-norm", {"head_dim": 16}),
        Family(
            "Qwen3-MoE",
            "qwen3_moe",
            ("Qwen/Qwen3-30B-A3B",),
            "k-norm; mixture of experts",
            {
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
            },
        ),
        Family(
            "Qwen3-Next",
            "qwen3_next",
            ("Qwen/Qwen3-Next-80B-A3B-Instruct",),
            "linear attention in most layers; partial RoPE, gated output",
            {
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 48,
            },
            quantized=(1,),
        ),
        Family(
            "Gemma 2",
            "gemma2",
            ("google/gemma-2-9b",),
            "soft-capped scores; alternating windows; head_dim 256",
            {
                "head_dim": 256,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 256,
                # Before 5.21 transformers chose one that leaves the soft cap out.
                "attn_implementation": "eager",
            },
            quantized=(1,),
        ),
        Family(
            "Gemma 3",
            "gemma3_text",
            ("google/gemma-3-1b-pt", "google/gemma-3-12b-pt"),
            "k-norm; windows in most layers, with a RoPE of their own",
            {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ALTERNATING},
            quantized=(1,),
        ),
        Family(
            "Phi-2",
            "phi",
            ("microsoft/phi-2",),
            "the model cuts out the channels that it rotates",
            rope("default", partial_rotary_factor=0.5),
            rotary_channels={0: (0, 8), 1: (0, 8)},
        ),
        Family(
            "Phi-3",
            "phi3",
            ("microsoft/Phi-3-mini-128k-instruct", "microsoft/phi-4"),
            "fused projections; longrope",
            # Short: texts of the tests are read with the long factors, those of Phi-4 are not.
            {
                **rope("longrope", **{**LONG, "original_max_position_embeddings": 256}),
                "original_max_position_embeddings": 256,
            },
        ),
        Family(
            "Phi-4-mini",
            "phi3",
            ("microsoft/Phi-4-mini-instruct",),
            "fused projections; longrope of a part of the channels",
            {
                **rope(
                    "longrope",
                    **{name: v[:6] if isinstance(v, list) else v for name, v in LONG.items()},
                    partial_rotary_factor=0.75,
                ),
                "original_max_position_embeddings": 1024,
            },
        ),
        Family(
            "gpt-oss",
            "gpt_oss",
            ("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
            "learned sinks in the softmax; alternating windows; YaRN",
            {
                "head_dim": 16,
                "sliding_window": WINDOW,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "layer_types": ALTERNATING,
            },
            quantized=(1,),
        ),
        Family(
            "OLMo-2", "olmo2", ("allenai/OLMo-2-1124-7B",), "norm of all keys of a token at once"
        ),
        Family(
            "OLMo-3",
            "olmo3",
            ("allenai/Olmo-3-1025-7B",),
            "norm of all keys of a token at once; windows in most layers",
            {"sliding_window": WINDOW, "layer_types": ALTERNATING},
            quantized=(1,),
        ),
        Family(
            "Granite",
            "granite",
            ("ibm-granite/granite-3.3-8b-base",),
            "scores, residuals and logits with multipliers of their own",
            {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        ),
        Family(
            "SmolLM3",
            "smollm3",
            ("HuggingFaceTB/SmolLM3-3B",),
            "layers without RoPE among others",
            {"no_rope_layers": [1, 0]},
            rotary_channels={1: (0, 0)},
        ),
        Family(
            "Command R",
            "cohere",
            ("CohereLabs/c4ai-command-r-v01",),
            "interleaved RoPE",
        ),
        Family(
            "Command R7B (Cohere2)",
            "cohere2",
            ("CohereLabs/c4ai-command-r7b-12-2024",),
            "no RoPE in layers of full attention; interleaved RoPE and windows in the others",
            {"sliding_window": WINDOW, "layer_types": ALTERNATING},
            quantized=(1,),
            rotary_channels={1: (0, 0)},
        ),
        Family(
            "GLM-4",
            "glm4",
            ("zai-org/GLM-4-9B-0414",),
            "interleaved RoPE of half of the channels",
            {"head_dim": 16},
        ),
        Family(
            "StableLM",
            "stablelm",
            ("stabilityai/stablelm-2-1_6b",),
            "the model cuts out a quarter of the channels, which it rotates",
            rope("default", partial_rotary_factor=0.25),
            rotary_channels={0: (0, 4), 1: (0, 4)},
        ),
        Family(
            "GPT-NeoX and Pythia",
            "gpt_neox",
            ("EleutherAI/pythia-6.9b", "EleutherAI/gpt-neox-20b"),
            "fused projections; RoPE of a quarter of the channels",
            {"num_key_value_heads": 4, **rope("default", partial_rotary_factor=0.25)},
        ),
        Family("StarCoder2", "starcoder2", ("bigcode/starcoder2-7b",), "biases"),
        Family("RoPE: linear", "llama", (), "positions divided", rope("linear", factor=4.0)),
        Family(
            "RoPE: dynamic",
            "llama",
            (),
            "frequencies grow with the text",
            rope("dynamic", factor=4.0),
        ),
        Family(
            "RoPE: YaRN",
            "llama",
            ("NousResearch/Yarn-Llama-2-7b-128k",),
            "cosines and sines are scaled, too",
            rope("yarn", factor=4.0, original_max_position_embeddings=512),
        ),
    )
}
"""By title. The last rows are kinds of RoPE on a Llama."""


@dataclass(frozen=True)
class Refused:
    """A family that is refused, and words of the reason."""

    title: str
    model_type: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)


REFUSED = (
    Refused("DeepSeek-V2, -V3 and other MLA", "deepseek_v3", "multi-head latent attention"),
    Refused("Encoder-decoders (T5, BART)", "bart", "is an encoder-decoder"),
    Refused("Encoders (BERT)", "bert", "is not a causal language model"),
    Refused("Llama 4", "llama4_text", "has no apply_rotary_pos_emb"),
    Refused("GPT-2, OPT", "gpt2", "has no apply_rotary_pos_emb"),
    # The second from transformers 5.24 on.
    Refused(
        "GPT-J, CodeGen",
        "gptj",
        "does not use transformers' attention interface|does not take queries and keys together",
    ),
    Refused("Falcon with ALiBi", "falcon", "ALiBi", {"alibi": True}),
    Refused("Gemma 3n", "gemma3n_text", "shares one cache among several layers"),
    Refused("Gemma 4", "gemma4_text", "layers whose caches differ in shape"),
    Refused("Hunyuan (dense, MoE)", "hunyuan_v1_dense", "between RoPE and attention"),
    Refused("nanochat", "nanochat", "between RoPE and attention"),
    Refused("DiffLlama", "diffllama", "that packed pages cannot do"),
    Refused("Mamba, RWKV and other recurrent models", "mamba", "has no num_attention_heads"),
    Refused("Bamba with no attention layer", "bamba", "nothing to quantize"),
    Refused("Falcon-H1, Zamba", "falcon_h1", "is of a type that kvq knows how to quantize"),
    Refused("MiMo-V2", "mimo_v2_flash", "vectors of two sizes"),
    Refused(
        "Windows shorter than a page in all layers",
        "mistral",
        "nothing to quantize",
        {"sliding_window": 128},
    ),
)
