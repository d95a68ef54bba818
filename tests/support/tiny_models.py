"""Small random models and texts: no network, no GPU."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

WORD_LIST = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were her all she there would their we him been has when who will more no if
out so said what up its about into than them can only other new some could time these two may then
do first any my now such like our over man me even most made after also
"""
WORDS = WORD_LIST.split()


def make_text(num_words: int, *, seed: int = 0) -> str:
    """Words drawn at random, in sentences and paragraphs."""
    source = random.Random(seed)
    sentences = []
    left = num_words
    while left > 0:
        length = min(left, source.randint(4, 20))
        sentences.append(" ".join(source.choice(WORDS) for _ in range(length)) + ".")
        left -= length
    return "\n\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5))


def make_tiny_llama(*, seed: int = 0, **overrides: int) -> LlamaForCausalLM:
    """A random Llama in fp32, eager attention; weights large enough that attention is not flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    options.update(overrides)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="eager")).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15, generator=generator)
    return model


def make_tiny_family(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A random model of another family, fp32: 2 layers, 4 query heads on 2 KV heads of 16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }
    if model_type.startswith("qwen3"):
        options["head_dim"] = 16
    options.update(overrides)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights near one, everything else as in the tiny Llama.
            mean = 1.0 if "norm" in name else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    return model.eval()
