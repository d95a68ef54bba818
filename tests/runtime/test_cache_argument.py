"""The cache has one name inside kvq, whatever transformers calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationMixin, LlamaForCausalLM

from kvq_runtime.cache_argument import (
    CACHE,
    as_taken,
    cache_name,
    returned_cache,
    with_one_name,
)


def older(input_ids: Any = None, past_key_values: Any = None) -> None: ...
def newer(input_ids: Any = None, cache: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(("forward", "name"), [(older, "past_key_values"), (newer, "cache")])
def test_the_name_is_that_of_the_signature(forward: Any, name: str) -> None:
    assert cache_name(forward) == name
    named = {"input_ids": 1, name: 2}
    assert with_one_name(named) == {"input_ids": 1, CACHE: 2}
    assert as_taken(forward, with_one_name(named)) == named


def test_what_a_forward_without_a_cache_is_given_stays() -> None:
    assert with_one_name({"input_ids": 1}) == as_taken(newer, {"input_ids": 1}) == {"input_ids": 1}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_found_in_what_is_returned(name: str) -> None:
    assert returned_cache(SimpleNamespace(**{name: "it"})) == "it"


def test_a_stock_model_returns_the_cache_that_it_took(tiny_llama: LlamaForCausalLM) -> None:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    name = cache_name(tiny_llama.forward)
    assert name == cache_name(GenerationMixin.prepare_inputs_for_generation)
    output = tiny_llama(torch.zeros(1, 3, dtype=torch.int64), use_cache=True, **{name: cache})
    assert returned_cache(output) is cache
    assert cache.get_seq_length() == 3
