from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from kvq_evaluation.baselines.exact import Exact
from kvq_evaluation.perplexity import evaluate
from kvq_runtime.evaluation_rule import attach_codec


def test_nothing_is_lost() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    codec = Exact(layers=[0])
    assert torch.equal(codec.decoded_keys(0, x), x)
    assert torch.equal(codec.decoded_values(0, x), x)
    assert codec.effective_bits(2, 64) == 16


@pytest.mark.parametrize("rotated_keys", [False, True])
def test_the_evaluation_itself_costs_nothing(
    tiny_llama: LlamaForCausalLM, rotated_keys: bool
) -> None:
    # In fp32 a number that passes the codec unchanged gives the same sums in the same order.
    codec = Exact(layers=[0, 1], rotated_keys=rotated_keys)
    windows = torch.randint(320, (2, 300), generator=torch.Generator().manual_seed(1))
    _, exact = evaluate(
        tiny_llama, windows, variants={"exact": lambda: attach_codec(tiny_llama, codec)}
    )
    assert exact.kl.tolist() == [0.0, 0.0]
    assert exact.agreement.tolist() == [299, 299]
