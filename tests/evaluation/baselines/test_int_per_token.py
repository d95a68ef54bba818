from __future__ import annotations

import torch

from kvq_evaluation.baselines.int_per_token import IntPerToken


def test_a_token_shares_one_scale_over_all_heads() -> None:
    # Head 0 spans 0..3, head 1 a step of 100: the layer's step is 100, so head 0 becomes 0.
    values = torch.stack([torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.arange(4.0)[None] * 100])
    decoded = IntPerToken(bits=2, layers=[0]).decoded_values(0, values)
    assert torch.equal(decoded[0], torch.zeros(1, 4))
    assert torch.equal(decoded[1], values[1])


def test_tokens_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 10, 16, generator=generator)
    codec = IntPerToken(bits=3, layers=[0])
    before = codec.decoded_keys(0, keys)
    changed = keys.clone()
    changed[0, 7] *= 100
    after = codec.decoded_keys(0, changed)
    same = torch.arange(10) != 7
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[1, 7], after[1, 7])


def test_effective_bits() -> None:
    assert IntPerToken(bits=3, layers=[0]).effective_bits(2, 64) == 3.25
    assert IntPerToken(bits=2, layers=[0]).effective_bits(8, 128) == 2.03125
