"""Small models that are made like large ones where it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from kvq_formats.errors import UnsupportedModelError
from kvq_runtime import miniature
from kvq_runtime.miniature import make_miniature
from tiny_models import make_tiny_llama


def config(model_type: str, **options: Any) -> Any:
    return CONFIG_MAPPING[model_type](**options)


def test_what_attention_depends_on_stays() -> None:
    large = config(
        "llama",
        hidden_size=8192,
        num_hidden_layers=3,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        attention_bias=True,
    )
    before = large.to_dict()
    model = make_miniature(large, name="org/large")
    small = model.config
    assert large.to_dict() == before
    assert (small.num_hidden_layers, small.head_dim) == (3, 128)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)
    assert small.rope_parameters == large.rope_parameters
    assert small.attention_bias
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize(
    ("heads", "expected"),
    [((32, 32), (2, 2)), ((32, 8), (4, 2)), ((8, 1), (2, 1)), ((1, 1), (1, 1))],
)
def test_heads_are_shared_as_they_were(heads: tuple[int, int], expected: tuple[int, int]) -> None:
    options = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    small = make_miniature(config("llama", num_hidden_layers=1, **options), name="x").config
    assert (small.num_attention_heads, small.num_key_value_heads) == expected


@pytest.mark.parametrize("model_type", ["gemma3", "mixtral", "gpt_neox", "qwen3_moe"])
def test_others_are_small_too(model_type: str) -> None:
    model = make_miniature(config(model_type), name="x")
    assert sum(parameter.nbytes for parameter in model.parameters()) < 500e6


def test_a_loaded_model_is_tried_in_its_own_class() -> None:
    class Mine(LlamaForCausalLM):
        pass

    model = make_miniature(make_tiny_llama().config, name="x", model_class=Mine)
    assert type(model) is Mine


def test_the_random_state_stays() -> None:
    config = make_tiny_llama().config
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make_miniature(config, name="x")
    assert torch.equal(torch.rand(2), expected)


def test_what_cannot_be_built_says_why() -> None:
    broken = make_tiny_llama().config
    broken.hidden_act = "no such thing"
    with pytest.raises(UnsupportedModelError, match=r"org/x cannot be tried .*KeyError"):
        make_miniature(broken, name="org/x")


def test_what_is_still_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniature, "LARGEST_BYTES", 10_000)
    with pytest.raises(UnsupportedModelError, match="would still take"):
        make_miniature(make_tiny_llama().config, name="org/x")
