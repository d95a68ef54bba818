"""Errors of attention outputs, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_evaluation.attention_error import attention_errors
from kvq_evaluation.baselines.exact import Exact
from kvq_evaluation.baselines.hadamard_int import HadamardInt
from tiny_models import make_tiny_llama


class Doubled(Exact):
    """Values twice as large: every output is, too."""

    def decoded_values(self, layer_idx: int, values: Tensor) -> Tensor:
        return 2 * values


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 300, (2, 50), generator=torch.Generator().manual_seed(1))


def test_nothing_lost_no_error(model: LlamaForCausalLM, windows: Tensor) -> None:
    assert attention_errors(model, windows, {"exact": Exact((0, 1))}) == {"exact": {0: 0, 1: 0}}


def test_doubled_values_are_off_by_all_there_is(model: LlamaForCausalLM, windows: Tensor) -> None:
    """Without a sink o' = 2 o in every layer, though the first layer's error is not passed on."""
    found = attention_errors(model, windows, {"doubled": Doubled((0, 1), sink_tokens=0)})
    # f32 sums of at most 50 terms in either.
    assert found["doubled"] == pytest.approx({0: 1.0, 1: 1.0}, abs=50 * 2**-23)


def test_fewer_bits_more_error_and_only_where_quantized(
    model: LlamaForCausalLM, windows: Tensor
) -> None:
    codecs = {str(bits): HadamardInt(bits=bits, layers=(1,)) for bits in (2, 3, 4)}
    found = attention_errors(model, windows, codecs)
    assert [set(errors) for errors in found.values()] == [{1}] * 3
    assert found["2"][1] > 1.5 * found["3"][1] > 2 * found["4"][1] > 0
