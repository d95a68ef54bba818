from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvq_evaluation.baselines.int_per_token import IntPerToken
from kvq_evaluation.perplexity import evaluate
from kvq_evaluation.rescale import outlier_channels
from kvq_formats.errors import ConfigError, UnsupportedModelError
from kvq_runtime.evaluation_rule import attach_codec

HEAD_DIM = 16


def projected(model: LlamaForCausalLM, name: str, input_ids: Tensor) -> Tensor:
    """Outputs of one projection of layer 0, f32 ``[T, heads * D]``."""
    taken: list[Tensor] = []
    projection = getattr(model.model.layers[0].self_attn, name)
    hook = projection.register_forward_hook(lambda _m, _args, output: taken.append(output[0]))
    with torch.no_grad():
        model(input_ids)
    hook.remove()
    return taken[0]


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(320, (1, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [8.0, 0.25, 64.0])
def test_the_function_is_preserved_to_the_bit(
    tiny_llama: LlamaForCausalLM, input_ids: Tensor, factor: float
) -> None:
    # Powers of two only move exponents, in every product and sum that the channel takes part in.
    with torch.no_grad():
        plain = tiny_llama(input_ids).logits
        with outlier_channels(tiny_llama, key_pairs=3, value_channels=2, factor=factor):
            rescaled = tiny_llama(input_ids).logits
    assert torch.equal(plain, rescaled)


def test_the_asked_channels_are_widened(tiny_llama: LlamaForCausalLM, input_ids: Tensor) -> None:
    keys, values = (projected(tiny_llama, name, input_ids) for name in ("k_proj", "v_proj"))
    with outlier_channels(tiny_llama, key_pairs=3, value_channels=2):
        wide_keys = projected(tiny_llama, "k_proj", input_ids) / keys
        wide_values = projected(tiny_llama, "v_proj", input_ids) / values
    assert set(wide_keys.unique().tolist()) == {1.0, 8.0}
    assert set(wide_values.unique().tolist()) == {1.0, 8.0}
    by_head = (wide_keys == 8).all(0).view(2, HEAD_DIM)
    assert by_head.sum(1).tolist() == [6, 6]
    # Both channels of a rotary pair.
    assert torch.equal(by_head[:, : HEAD_DIM // 2], by_head[:, HEAD_DIM // 2 :])
    assert (wide_values == 8).all(0).view(2, HEAD_DIM).sum(1).tolist() == [2, 2]


def test_weights_are_restored(tiny_llama: LlamaForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}

    def interrupted() -> None:
        with outlier_channels(tiny_llama, key_pairs=1, value_channels=1, factor=2.0):
            changed = tiny_llama.state_dict()
            assert any(not torch.equal(changed[name], before[name]) for name in before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = tiny_llama.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_biases_are_scaled_too(input_ids: Tensor) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_()
        plain = model(input_ids).logits
        with outlier_channels(model, key_pairs=3, value_channels=2):
            rescaled = model(input_ids).logits
    assert torch.equal(plain, rescaled)


def test_per_token_codes_suffer(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(320, (2, 200), generator=torch.Generator().manual_seed(1))
    codec = IntPerToken(bits=3, layers=[0, 1])
    variants = {"int3": lambda: attach_codec(tiny_llama, codec)}
    _, plain = evaluate(tiny_llama, windows, variants=variants)
    with outlier_channels(tiny_llama, key_pairs=2, value_channels=0):
        _, rescaled = evaluate(tiny_llama, windows, variants=variants)
    assert rescaled.mean_kl.mean > 2 * plain.mean_kl.mean


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 7.0},
        {"factor": -8.0},
        {"factor": 0.0},
        {"factor": float("inf")},
        {"key_pairs": 9},
        {"value_channels": 17},
        {"key_pairs": -1},
    ],
)
def test_bad_options(tiny_llama: LlamaForCausalLM, options: dict) -> None:
    with (
        pytest.raises(ConfigError),
        outlier_channels(tiny_llama, **{"key_pairs": 1, "value_channels": 1, **options}),
    ):
        pass


def test_other_architectures_are_refused() -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    normed = Qwen3ForCausalLM(
        Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, intermediate_size=32)
    )
    fused = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2))
    for model in (normed, fused):
        with (
            pytest.raises(UnsupportedModelError),
            outlier_channels(model, key_pairs=1, value_channels=1),
        ):
            pass
