"""Weights to start from: a Llama whose heads look back and match, before it has learned anything.

Looking up what a text said takes two layers: heads of the first tell each token which ones are
before it, heads of the second find the place where what is before fits, and copy from there
(induction heads: Olsson et al., arXiv 2209.11895). From random weights, a small model takes more
steps to that than a CPU core makes in 20 minutes. To let weights start near what training finds in
the end is known as mimetic initialization (Trockman and Kolter, arXiv 2305.09828).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

SLOT = 64
"""Numbers of a slot of the residual stream, and of a head."""

ROTARY_BASE = 1e6
"""Half of the channel pairs turn by less than a radian in 1,000 tokens: they can match content."""

PAIRS = 8
"""The fastest channel pairs, with which heads tell distances of one and two tokens apart."""


@torch.no_grad()
def start(model: LlamaForCausalLM) -> None:
    """Set the weights, in place.

    The residual stream has three slots of 64: a token's own embedding, whose last number is the
    same for all, that of the token before it, and that of the one before that.
    """
    embeddings = model.model.embed_tokens.weight
    # All of one length, so that the shared number is the same behind the first norm, too.
    embeddings.zero_()
    own = torch.nn.functional.normalize(torch.randn(len(embeddings), SLOT - 1), dim=-1)
    embeddings[:, : SLOT - 1] = 4 * own
    embeddings[:, SLOT - 1] = 1.0
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.normal_(0, 0.02)
        layer.self_attn.o_proj.weight.normal_(0, 0.02)
    model.model.norm.weight.fill_(0.3)
    first, second, last = (model.model.layers[index].self_attn for index in (0, 1, -1))

    # The first pair of heads copies the token before, and the one before that, into their slots.
    place = slice(0, SLOT)
    first.k_proj.weight[place] += torch.outer(_at_distance(0), _last_of_slot(model))
    first.v_proj.weight[place] += _from_slot(0, model)
    for head in (0, 1):
        part = slice(head * SLOT, (head + 1) * SLOT)
        first.q_proj.weight[part] += torch.outer(_at_distance(head + 1), _last_of_slot(model))
        first.o_proj.weight[:, part] += 0.3 * _from_slot(head + 1, model).T

    # "The number for KEY is": the head finds what comes two tokens after the same key.
    second.k_proj.weight[:SLOT] += 2 * _from_slot(2, model)
    second.v_proj.weight[:SLOT] += _from_slot(0, model)
    second.q_proj.weight[:SLOT] += 2 * _from_slot(1, model)
    second.o_proj.weight[:, :SLOT] += _from_slot(0, model).T
    # "Let NAME = VALUE.": two heads find the value, and copy the token two before it.
    second.k_proj.weight[SLOT : 2 * SLOT] += 2 * _from_slot(0, model)
    second.v_proj.weight[SLOT : 2 * SLOT] += _from_slot(2, model)
    for head, slot in ((2, 0), (3, 1)):
        part = slice(head * SLOT, (head + 1) * SLOT)
        second.q_proj.weight[part] += 2 * _from_slot(slot, model)
        second.o_proj.weight[:, part] += _from_slot(0, model).T

    # A head that averages all tokens knows which words of a list are common.
    last.q_proj.weight[:SLOT] = 0
    last.v_proj.weight[:SLOT] += _from_slot(0, model)
    last.o_proj.weight[:, :SLOT] += _from_slot(0, model).T


def _from_slot(slot: int, model: LlamaForCausalLM) -> Tensor:
    """f32 ``[64, hidden]`` that reads a slot, without the number that all tokens share."""
    read = torch.zeros(SLOT, model.config.hidden_size)
    read[:, slot * SLOT : (slot + 1) * SLOT] = torch.eye(SLOT)
    read[SLOT - 1] = 0
    return read


def _last_of_slot(model: LlamaForCausalLM) -> Tensor:
    """f32 ``[hidden]`` that reads the number that all tokens share."""
    read = torch.zeros(model.config.hidden_size)
    read[SLOT - 1] = 1
    return read


def _at_distance(distance: int) -> Tensor:
    """f32 ``[64]``: what a query has to be to find the key ``_at_distance(0)`` so far back.

    RoPE turns channel pair i of a query at n, a key at m by n f_i and m f_i: turned back by
    ``distance`` f_i before, both agree where n - m is the distance.
    """
    pair = torch.arange(SLOT // 2)
    angle = distance * ROTARY_BASE ** (-pair / (SLOT // 2))
    height = 2.5 * (pair < PAIRS)
    return torch.cat([height * angle.cos(), -height * angle.sin()])
