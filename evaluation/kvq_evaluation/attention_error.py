"""What a quantized cache does to the output of each attention layer, other layers being exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.capture import evaluation_mode
from kvq_runtime.evaluation_rule import CacheCodec, EvaluationTap
from kvq_runtime.offload import input_device
from kvq_runtime.rope import AttentionCall, tap_attention


def attention_errors(
    model: PreTrainedModel, windows: Tensor, codecs: Mapping[str, CacheCodec]
) -> dict[str, dict[int, float]]:
    """Relative error of each layer's attention output under the evaluation rule, by codec.

    ``sqrt(sum |o' - o|^2 / sum |o|^2)`` over all tokens and heads of int64 ``[S, T]`` windows,
    where ``o`` is what the layer makes of exact keys and values and ``o'`` what it makes of decoded
    ones. Every layer is handed exact activations, so that errors do not pile up: a layer's figure
    is its own.
    """
    found = {}
    for name, codec in codecs.items():
        tap = _ErrorTap(codec)
        with torch.no_grad(), evaluation_mode(model), tap_attention(model, tap):
            for window in windows.split(1):
                model.base_model(input_ids=window.to(input_device(model)), use_cache=False)
        found[name] = {layer: (a / b) ** 0.5 for layer, (a, b) in sorted(tap.sums.items())}
    return found


class _ErrorTap(EvaluationTap):
    """Attends both ways, and hands the exact output on."""

    def __init__(self, codec: CacheCodec) -> None:
        super().__init__(codec)
        self.sums: dict[int, tuple[float, float]] = {}

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        exact = call.attend(call.query, call.key, call.value)
        if call.layer_idx in self.codec.layers:
            decoded, _ = super().on_attention(call)
            error, size = self.sums.get(call.layer_idx, (0.0, 0.0))
            error += float((decoded.double() - exact[0].double()).square().sum())
            size += float(exact[0].double().square().sum())
            self.sums[call.layer_idx] = (error, size)
        return exact
