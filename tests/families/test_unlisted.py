"""A family in no table, in code of its own: it works if it behaves, or the true reason is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from exact_pages import exact_codecs
from kvq_formats.errors import UnsupportedModelError
from kvq_runtime.cache_argument import cache_name
from kvq_runtime.examine import ExaminedLayer, examine
from kvq_runtime.resolve import resolve_model
from kvq_runtime.runtime_rule import attach_pages
from padded_batches import batch, fed
from unheard import load_unheard, write_unheard

ROTATE = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)"
CACHE = cache_name(LlamaForCausalLM.forward)
UPDATE = f"        if {CACHE} is not None:\n            key_states, value_states ="

EVERY_OTHER = f"""if self.layer_idx % 2:
            {ROTATE}"""


def examined(folder: Path) -> tuple[ExaminedLayer, ...]:
    resolved = resolve_model(folder, trust_remote_code=True)
    return examine(resolved.config, name="org/unheard", trust_remote_code=True)


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, [(0, 16), (0, 16)]),
        ({ROTATE: EVERY_OTHER}, [(0, 0), (0, 16)]),
        # Queries may be scaled after RoPE, which keys may not be.
        ({ROTATE: f"{ROTATE}\n        query_states = query_states * 1.25"}, [(0, 16), (0, 16)]),
        ({"self.scaling = self.head_dim**-0.5": "self.scaling = 0.4"}, [(0, 16), (0, 16)]),
    ],
    ids=["as it is", "RoPE in every other layer", "scaled queries", "a scale of its own"],
)
def test_what_behaves_like_a_family_that_works_does_work(
    changes: dict[str, str], channels: list[tuple[int, int]], tmp_path: Path
) -> None:
    folder = write_unheard(tmp_path, changes)
    layers = examined(folder)
    assert [layer.rotary_channels for layer in layers] == channels
    model = load_unheard(folder)
    ids, mask, positions = batch(560, 9)
    with torch.no_grad():
        stock, _ = fed(model, ids, mask, positions, [556, 1, 1, 1, 1])
        with attach_pages(model, exact_codecs(model, dict(enumerate(channels)))):
            found, _ = fed(model, ids, mask, positions, [556, 1, 1, 1, 1])
    attended = mask.bool()
    scale = stock[attended].abs().max()
    # Sums over 64 channels, four in a row in each of two layers; angles of up to 560 radians.
    roundings = (8 * 64 + 560) * torch.finfo(torch.float32).eps
    assert (found - stock)[attended].abs().max() <= roundings * scale


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {ROTATE: f"{ROTATE}\n        key_states = key_states * 1.25"},
            "changes the keys of layer 0 between RoPE and attention",
        ),
        (
            {
                UPDATE: "        if self.layer_idx == 1:\n"
                f"            key_states = key_states * 2\n{UPDATE}"
            },
            "changes the keys of layer 1 between RoPE and attention",
        ),
        (
            {"dropout=0.0 if not": "weird_bias=torch.zeros(1), dropout=0.0 if not"},
            "cannot run on packed pages: attention option weird_bias is not honoured",
        ),
        (
            {
                ROTATE: f"{ROTATE}\n        if self.layer_idx == 1:\n            "
                "query_states = query_states.relu()"
            },
            r"does not do in layer 1 what kvq makes of it: .* off by \d",
        ),
        (
            {"position_ids=position_ids)\n": "position_ids=position_ids + cache_offset)\n"},
            "fails by itself .NameError: name 'cache_offset'",
        ),
        ({"apply_rotary_pos_emb": "turn"}, "has no apply_rotary_pos_emb"),
    ],
    ids=[
        "scaled keys",
        "scaled keys of one layer",
        "a bias of positions",
        "something done to rotated queries",
        "a mistake",
        "another name",
    ],
)
def test_what_does_not_is_refused_with_the_reason(
    changes: dict[str, str], reason: str, tmp_path: Path
) -> None:
    folder = write_unheard(tmp_path, changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        examined(folder)
