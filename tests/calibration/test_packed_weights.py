"""4-bit weights that would be rearranged, with a stand-in for bitsandbytes' linear layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import Tensor, nn

from kvq_calibration.packed_weights import check_differentiable, weights_as_loaded
from kvq_calibration.sensitivity import activation_gradients
from kvq_formats.errors import CalibrationError
from tiny_models import make_tiny_llama


class Packing(nn.Linear):
    """Rearranges its weights as ``Linear4bit`` does: in evaluation mode, without gradients."""

    support_avx512bf16_for_cpu = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not x.requires_grad:
            self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
        return super().forward(x)


def make() -> nn.Module:
    model = make_tiny_llama()
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Packing(old.in_features, old.out_features, bias=False)
    return model.eval()


def test_weights_stay_as_they_were_loaded() -> None:
    model = make()
    ids = make_tiny_llama().dummy_inputs["input_ids"] % 300
    modes = [module.training for module in model.modules()]
    with weights_as_loaded(model):
        model(ids)
        check_differentiable(model)
    assert [module.training for module in model.modules()] == modes
    model.requires_grad_(False)
    model(ids)
    with (
        pytest.raises(CalibrationError, match="rearranged the 4-bit weights") as caught,
        activation_gradients(model),
    ):
        pass
    assert "--sensitivity none" in (caught.value.hint or "")


def test_other_models_are_left_alone() -> None:
    model = make_tiny_llama()
    with weights_as_loaded(model):
        assert not any(module.training for module in model.modules())
    check_differentiable(model)
