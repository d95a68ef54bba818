"""Keys before RoPE and values of every quantized layer, while a batch runs through the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvq_formats.errors import CalibrationError
from kvq_runtime.offload import input_device
from kvq_runtime.rope import AttentionCall, AttentionTap, RotaryCall


@dataclass
class KeyValueTap(AttentionTap):
    """Keeps the keys and values of one forward, ``[B, H, T, D]`` in the model's dtype.

    Fields:
        layers: indices of the layers to keep.
        keep_values: False where only keys are wanted.
        keys, values: by layer index; with gradients enabled they keep theirs after a backward.
    """

    layers: Collection[int]
    keep_values: bool = True
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    recording: bool = False

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        """Keep the keys, then rotate as the model does."""
        if self.recording and call.layer_idx in self.layers:
            self.keys[call.layer_idx] = _kept(call.key)
        return call.rotate(call.query, call.key)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Keep the values, then attend as the model does."""
        if self.recording and self.keep_values and call.layer_idx in self.layers:
            self.values[call.layer_idx] = _kept(call.value)
        return call.attend(call.query, call.key, call.value)

    def start(self) -> None:
        """Forget the last batch and record the next forward."""
        self.keys.clear()
        self.values.clear()
        self.recording = True

    def stop(self) -> None:
        """Stop recording, and check that every layer was seen.

        The recomputation of gradient checkpointing runs through the tap once more: what it makes
        has no gradient and must not replace what the forward recorded.
        """
        self.recording = False
        missing = sorted(set(self.layers) - set(self.keys))
        if missing:
            raise CalibrationError(
                f"layer {missing[0]} never rotated its keys, so they cannot be taken before RoPE; "
                "layers without RoPE are not supported."
            )


def _kept(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.retain_grad()
        return x
    return x.detach()


def finite(x: Tensor, *, layer_idx: int, what: str) -> Tensor:
    """``x`` in fp32; raises CalibrationError where it has NaN or infinity."""
    x = x.float()
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise CalibrationError(
            f"{what} of layer {layer_idx} hold {bad:,} numbers that are NaN or infinite, of "
            f"{x.numel():,}.",
            hint="--dtype bfloat16 or float32 if the model was run in float16; else check the "
            "model's weights",
        )
    return x


def token_rows(x: Tensor, *, sink_tokens: int) -> Tensor:
    """``[B, H, T, D]`` -> ``[B * (T - sinks), H, D]``: tokens after the sinks of each row."""
    return x.detach()[:, :, sink_tokens:].transpose(1, 2).flatten(0, 1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off; every module's own mode is back on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def run_decoder(model: PreTrainedModel, input_ids: Tensor) -> None:
    """One forward of the decoder alone: the output layer is not needed to see keys."""
    model.base_model(input_ids=input_ids.to(input_device(model)), use_cache=False)
