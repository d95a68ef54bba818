from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from kvq_formats.errors import ConfigError
from kvq_runtime.sampling import Sampling, seeded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1, expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p is 0, expected a number above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p is 1\.5"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0, expected at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0, expected a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"seed": 2**64}, "seed is .* expected 0 to"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Sampling(**options)
    assert (caught.value.hint or "").startswith("--")
    assert caught.value.exit_code == 2


def test_the_models_own_options_are_not_used(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.5, top_k=3, repetition_penalty=1.3, eos_token_id=7
    )
    for sampling in (Sampling(), Sampling(temperature=0.9), Sampling(0.9, 0.8, 4, 1.1)):
        config, _ = tiny_llama._prepare_generation_config(GenerationConfig(**sampling.options()))
        assert config.do_sample == (sampling.temperature > 0)
        assert config.repetition_penalty == (sampling.repetition_penalty or 1.0)
        assert config.eos_token_id == 7
        if sampling.temperature:
            assert config.temperature == sampling.temperature
            assert config.top_p == (sampling.top_p or 1.0)
            assert config.top_k == (sampling.top_k or 0)


def test_random_numbers_are_seeded_and_put_back(tiny_llama: LlamaForCausalLM) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with seeded(tiny_llama, 1):
        first = torch.rand(4)
    with seeded(tiny_llama, 1):
        again = torch.rand(4)
    with seeded(tiny_llama, 2):
        other = torch.rand(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(4), expected)


def test_json() -> None:
    assert Sampling(temperature=0.5, top_k=3, seed=4).to_json() == {
        "temperature": 0.5,
        "top_p": None,
        "top_k": 3,
        "repetition_penalty": None,
        "seed": 4,
    }
