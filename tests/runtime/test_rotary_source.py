"""The rotary module of a layer is found, and its frequencies are read as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvq_formats.errors import UnsupportedModelError
from kvq_runtime.rotary_source import RotarySource, find_source

ATTENTION = "text.layers.0.attention"


class Rotary(nn.Module):
    def __init__(self, *prefixes: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for prefix in prefixes or ("",):
            frequencies = torch.tensor([1.0, 0.1], dtype=dtype)
            setattr(self, f"{prefix}inv_freq", nn.Buffer(frequencies, persistent=False))
            setattr(self, f"{prefix}attention_scaling", 1.25)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["text.rotary"], "text.rotary"),
        (["rotary"], "rotary"),
        # Another tower has one of its own.
        (["vision.rotary", "text.rotary"], "text.rotary"),
        # The layer's own is nearer.
        (["text.rotary", "text.layers.0.attention.rotary"], "text.layers.0.attention.rotary"),
    ],
)
def test_the_nearest_rotary_module_is_taken(names: list[str], found: str) -> None:
    rotary = {name: Rotary() for name in names}
    assert find_source(nn.Module(), rotary, ATTENTION, None).module is rotary[found]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], f"no module .* was found for {ATTENTION}"),
        (["text.rotary", "text.local_rotary"], "text has 2 modules"),
        (["text.rotary", "text.others.0"], "text has 2 modules"),
        (["vision.rotary", "audio.rotary"], "it has 2 modules"),
    ],
)
def test_none_or_several_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_source(nn.Module(), {name: Rotary() for name in names}, ATTENTION, None)
    assert caught.value.hint


def test_frequencies_of_a_layer_type_are_that_layers() -> None:
    rotary = {"text.rotary": Rotary("full_attention_", "sliding_attention_")}
    source = find_source(nn.Module(), rotary, ATTENTION, "full_attention")
    rotary["text.rotary"].full_attention_inv_freq.mul_(2)
    assert source.angles().frequencies.tolist() == [2.0, torch.tensor(0.1).item() * 2]
    assert source.angles().scaling == 1.25
    for unknown in ("chunked_attention", None):
        with pytest.raises(UnsupportedModelError, match="no module"):
            find_source(nn.Module(), rotary, ATTENTION, unknown)


def test_original_frequencies_are_not_those_in_use() -> None:
    with pytest.raises(UnsupportedModelError, match="no module"):
        find_source(nn.Module(), {"text.rotary": Rotary("original_")}, ATTENTION, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_angles_are_read_anew_when_something_changed(dtype: torch.dtype) -> None:
    module = Rotary(dtype=dtype)
    source = RotarySource(module, None)
    first = source.angles()
    assert source.angles() is first
    # Written, but the same.
    module.inv_freq.copy_(module.inv_freq.clone())
    assert source.angles() is first
    module.inv_freq.mul_(2)
    second = source.angles()
    assert torch.equal(second.frequencies, 2 * first.frequencies)
    module.inv_freq = nn.Buffer(3 * module.inv_freq)
    third = source.angles()
    assert torch.equal(third.frequencies, module.inv_freq.double())
    module.attention_scaling = 1.5
    assert (third.scaling, source.angles().scaling) == (1.25, 1.5)


def test_buffers_made_in_inference_mode_are_compared() -> None:
    module = Rotary()
    source = RotarySource(module, None)
    with torch.inference_mode():
        module.inv_freq = nn.Buffer(module.inv_freq.clone())
        first = source.angles()
        module.inv_freq.mul_(2)
        assert torch.equal(source.angles().frequencies, 2 * first.frequencies)
