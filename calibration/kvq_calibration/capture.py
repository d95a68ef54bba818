"""Keys before RoPE and values of every quantized layer, while a batch runs through the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvq_formats.errors import CalibrationError
from kvq_runtime.offload import input_device
from kvq_runtime.rope import AttentionCall, AttentionTap
from kvq_runtime.rotary_channels import RotaryChannels, key_before_rope, splice


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
    keys: dict[int, CapturedKeys] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    recording: bool = False

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Keep keys and values, then attend as the model does."""
        if self.recording and call.layer_idx in self.layers:
            self.keys[call.layer_idx] = CapturedKeys.of(call)
            if self.keep_values:
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
                f"layer {missing[0]} never called the attention that kvq measures it in."
            )


@dataclass(frozen=True)
class CapturedKeys:
    """Keys of one layer before RoPE, in the pieces that the model has them in.

    Fields:
        rotary: ``[B, H, T, R]``, what goes through RoPE; None in layers without.
        attended: ``[B, H, T, D]``, what the layer attends over; None where ``rotary`` is all of it.
        channels: of ``rotary`` within D.
    """

    rotary: Tensor | None
    attended: Tensor | None
    channels: RotaryChannels

    @classmethod
    def of(cls, call: AttentionCall) -> Self:
        """Keep what a layer is about to attend over, as it was before RoPE.

        Raises UnsupportedModelError where the model changes its keys after RoPE.
        """
        channels = key_before_rope(call).channels
        rotary = None if call.rotary is None else _kept(call.rotary.key)
        is_whole = channels == (0, call.key.shape[-1])
        return cls(rotary, None if is_whole else _kept(call.key), channels)

    def numbers(self) -> Tensor:
        """``[B, H, T, D]``, model dtype, without a gradient."""
        return self._joined(lambda piece: piece.detach())

    def gradient(self) -> Tensor | None:
        """Gradient of the loss at each of them, after a backward; None if none arrived."""
        pieces = [piece for piece in (self.attended, self.rotary) if piece is not None]
        if any(piece.grad is None for piece in pieces):
            return None
        return self._joined(lambda piece: cast(Tensor, piece.grad))

    def _joined(self, look: Callable[[Tensor], Tensor]) -> Tensor:
        if self.attended is None or self.rotary is None:
            piece = self.attended if self.rotary is None else self.rotary
            return look(cast(Tensor, piece))
        return splice(look(self.attended), look(self.rotary), self.channels)


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
