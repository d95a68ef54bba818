"""Where the part of a key that goes through RoPE is found, and how it is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from families import FAMILIES
from kvq_formats.errors import UnsupportedModelError
from kvq_runtime.rope import AttentionCall, AttentionTap, RotaryCall, tap_attention
from kvq_runtime.rotary_channels import UNROTATED, find_channels, key_before_rope, splice


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 12), st.data())
def test_a_part_is_found_where_it_was_put(D: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, D - 1))
    stop = data.draw(st.integers(start + 1, D))
    key, part = numbers(2, 3, 4, D), numbers(2, 3, 4, stop - start, seed=1)
    joined = splice(key, part, (start, stop))
    assert find_channels(part, joined) == (start, stop)
    assert torch.equal(joined[..., start:stop], part)
    assert torch.equal(joined[..., :start], key[..., :start])
    assert torch.equal(joined[..., stop:], key[..., stop:])


def test_the_whole_key_and_none_of_it() -> None:
    key = numbers(1, 2, 3, 4)
    assert find_channels(key, key) == find_channels(key.clone(), key) == (0, 4)
    assert find_channels(None, key) == UNROTATED
    assert splice(key, part := numbers(1, 2, 3, 4, seed=1), (0, 4)) is part


@pytest.mark.parametrize(
    "attended",
    [
        numbers(1, 2, 3, 4) * 1.001,
        numbers(1, 2, 3, 4).double(),
        numbers(1, 2, 3, 3),
        numbers(1, 2, 5, 4),
        numbers(1, 4, 3, 4),
    ],
    ids=["scaled", "of another dtype", "shorter", "of other tokens", "of other heads"],
)
def test_what_is_not_there_is_not_found(attended: Tensor) -> None:
    assert find_channels(numbers(1, 2, 3, 4), attended) is None


def test_numbers_that_are_none_are_somebody_elses_complaint() -> None:
    key = numbers(1, 1, 2, 4)
    key[0, 0, 1, 2] = torch.nan
    assert find_channels(key.clone(), key) == (0, 4)


class Before(AttentionTap):
    """Keeps keys before RoPE as they are put together, and as the rotary function got them."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}
        self.given: dict[int, Tensor] = {}
        self.attended: dict[int, Tensor] = {}

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        self.given[call.layer_idx] = call.key
        return super().on_rotary(call)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.found[call.layer_idx] = key_before_rope(call)
        self.attended[call.layer_idx] = call.key
        return super().on_attention(call)


@pytest.mark.parametrize("title", ["Llama 3.x", "Phi-2", "StableLM", "SmolLM3", "GLM-4"])
@torch.no_grad()
def test_keys_before_rope_of_a_model(title: str) -> None:
    """Put together, they are what the projection gave; rotated, what attention sees."""
    family = FAMILIES[title]
    model, tap = family.make(), Before()
    projected: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(
            lambda _m, _a, out, index=index: projected.__setitem__(index, out)
        )
    with tap_attention(model, tap):
        model(torch.randint(3, 199, (2, 9), generator=torch.Generator().manual_seed(0)))
    for index in (0, 1):
        before = tap.found[index]
        assert before.channels == family.rotary_channels.get(index, (0, 16))
        assert torch.equal(before.key, projected[index].unflatten(-1, (2, 16)).transpose(1, 2))
        assert torch.equal(before.rotated(before.key), tap.attended[index])


@torch.no_grad()
def test_keys_that_change_after_rope_are_refused() -> None:
    class Scaling(Before):
        def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            changed = AttentionCall(**{**vars(call), "key": call.key * 2})
            return super().on_attention(changed)

    model = FAMILIES["Mistral"].make()
    with (
        tap_attention(model, Scaling()),
        pytest.raises(UnsupportedModelError, match="layer 0 changes its keys between RoPE and"),
    ):
        model(torch.randint(3, 199, (1, 9)))
