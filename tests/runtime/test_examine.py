"""What is said of a model that was tried in miniature, and what a drift looks like."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from families import FAMILIES, REFUSED, Refused
from kvq_formats.errors import UnsupportedModelError
from kvq_runtime import runtime_rule
from kvq_runtime.drift import Drift
from kvq_runtime.examine import examine
from tiny_models import make_tiny_llama


@pytest.mark.parametrize("title", FAMILIES)
def test_what_is_found_of_a_family(title: str) -> None:
    family = FAMILIES[title]
    config = family.make().config
    layers = examine(config, name="org/model")
    assert [layer.layer_idx for layer in layers] == [0, 1]
    assert tuple(layer.layer_idx for layer in layers if layer.quantized) == family.quantized
    D = 256 if title == "Gemma 2" else 16
    for layer in layers:
        if not layer.quantized:
            assert layer.rotary_channels is layer.drift is None
            continue
        assert layer.rotary_channels == family.rotary_channels.get(layer.layer_idx, (0, D))
        assert layer.drift is not None
        # Not as good as a derived bound allows, but as good as one expects of roundings.
        assert 0 < layer.drift < 0.1


def test_what_attention_honours_is_told() -> None:
    gemma, oss = (
        examine(FAMILIES[title].make().config, name="x") for title in ("Gemma 2", "gpt-oss")
    )
    assert [layer.options for layer in gemma] == [("softcap", "sliding_window"), ("softcap",)]
    assert [layer.options for layer in oss] == [("s_aux", "sliding_window"), ("s_aux",)]


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.title)
def test_the_reason_of_a_refusal(family: Refused) -> None:
    config = CONFIG_MAPPING[family.model_type](**family.options)
    with pytest.raises(UnsupportedModelError, match=family.reason):
        examine(config, name="org/model")


@pytest.mark.parametrize("factor", [1.02, 0.5])
def test_a_layer_that_drifts_is_named(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kvq did not honour a layer's scale."""
    honoured = runtime_rule.attention_options

    def of_layers(options: Any, **sizes: Any) -> Any:
        found = honoured(options, **sizes)
        calls.append(1)
        # Two layers take turns.
        wrong = len(calls) % 2 == 0
        return type(found)(**{**vars(found), "scaling": found.scaling * (factor if wrong else 1)})

    calls: list[int] = []
    monkeypatch.setattr(runtime_rule, "attention_options", of_layers)
    with pytest.raises(
        UnsupportedModelError, match=r"does not do in layer 1 what .* off by [\d.e-]+, and rounding"
    ):
        examine(make_tiny_llama().config, name="org/model")


def test_a_drift_in_units_of_its_bound() -> None:
    assert not Drift(found=float("nan"), bound=1.0).relative <= 1
    assert Drift(found=2.0, bound=1.0).relative == 2.0


def models_alive() -> set[int]:
    gc.collect()
    # isinstance() would wake lazy objects of other libraries.
    return {id(x) for x in gc.get_objects() if issubclass(type(x), PreTrainedModel)}


def test_nothing_is_left_of_a_trial() -> None:
    model = make_tiny_llama()
    ids = torch.randint(3, 300, (1, 20))
    before = models_alive()
    with torch.no_grad():
        stock = model(ids).logits
        examine(model.config, name="x", model_class=type(model))
        assert torch.equal(model(ids).logits, stock)
    assert models_alive() <= before
