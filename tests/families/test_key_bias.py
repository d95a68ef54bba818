"""Qwen2 adds a bias to its keys, which reaches hundreds in some channels of its 7B model.

Before RoPE it is constant: the centre of a channel takes it away. After RoPE it turns with the
position and is the largest thing in every key: a scale a token is spent on it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from calibrated import calibrated, divergence
from families import FAMILIES
from kvq_evaluation.baselines.int_per_token import IntPerToken
from kvq_runtime.attach import attach
from kvq_runtime.evaluation_rule import attach_codec
from padded_batches import batch

LARGE = 100.0


def qwen2(bias: float) -> PreTrainedModel:
    """Every fourth channel of the keys of each layer shifted by ``bias``, one way or the other."""
    model = FAMILIES["Qwen2 and Qwen2.5"].make()
    signs = torch.randint(0, 2, (32,), generator=torch.Generator().manual_seed(3)) * 2.0 - 1.0
    signs[torch.arange(32) % 4 != 0] = 0.0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += bias * signs
            # Queries that do not look where the bias is, so that attention stays what it was.
            q_proj = layer.self_attn.q_proj
            blind = (signs != 0).view(2, 1, 16).expand(2, 2, 16).reshape(64)
            blind = blind | blind.view(4, 2, 8).flip(1).reshape(64)
            q_proj.weight[blind] = 0.0
            q_proj.bias[blind] = 0.0
    return model


@torch.no_grad()
def test_a_large_key_bias_costs_nothing_before_rope_and_everything_after() -> None:
    ids, mask, positions = batch(400, 0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    ours, per_token = [], []
    for bias in (0.0, LARGE):
        model = qwen2(bias)
        with torch.enable_grad():
            sidecar = calibrated(model)
        stock = model(ids, **inputs).logits
        with attach(model, sidecar, rule="evaluation"):
            ours.append(divergence(stock, model(ids, **inputs).logits, mask))
        with attach_codec(model, IntPerToken(bits=4, layers=(0, 1))):
            per_token.append(divergence(stock, model(ids, **inputs).logits, mask))
    # A bias of 100 rounds keys to 4e-6, 1e-5 of a channel's range: so many codes may be others.
    assert ours[1] == pytest.approx(ours[0], rel=0.01)
    # A step of a scale a token grows from 1 / 15 of the keys' range to 1 / 15 of the bias's.
    assert per_token[1] > 20 * per_token[0]
    assert per_token[1] > 20 * ours[1]
