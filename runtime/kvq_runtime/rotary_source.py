"""Where a model's rotary angles come from: the module that holds the frequencies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvq_formats.errors import UnsupportedModelError
from kvq_kernels.rotary import RotaryAngles
from kvq_runtime.supported_models import EXAMPLE

FREQUENCIES = "inv_freq"
"""Buffer of a rotary module: radians a position, f32 ``[R / 2]``."""


class RotarySource:
    """Where a layer's angles come from: a rotary module, and a layer type if it has several."""

    def __init__(self, module: nn.Module, layer_type: str | None) -> None:
        """``layer_type`` is None where the module has one set of frequencies."""
        self.module = module
        self.layer_type = layer_type
        self.prefix = "" if layer_type is None else f"{layer_type}_"
        self._read: tuple[Tensor, int | None, float] | None = None
        self._angles: RotaryAngles | None = None

    @property
    def frequencies(self) -> Tensor:
        """The module's own, f32 or the dtype that the model was cast to."""
        return self.module.get_buffer(self.prefix + FREQUENCIES)

    @property
    def scaling(self) -> float:
        return float(getattr(self.module, f"{self.prefix}attention_scaling", 1.0))

    def cos_sin(self, positions: Tensor) -> Any:
        """What the module returns for i64 ``[T]``, in f32; it may change its frequencies."""
        device = self.frequencies.device
        like = torch.empty(0, dtype=torch.float32, device=device)
        arguments = () if self.layer_type is None else (self.layer_type,)
        # Not the module itself: its hooks are for the forwards of the model.
        return self.module.forward(like, positions.to(device)[None], *arguments)

    def snapshot(self) -> RotaryAngles:
        """The angles of now."""
        # A copy at any dtype: the buffer may be changed in place.
        frequencies = self.frequencies.detach().to(torch.float64, copy=True)
        return RotaryAngles(frequencies=frequencies, scaling=self.scaling)

    def angles(self) -> RotaryAngles:
        """``snapshot``, or the last one if nothing has changed since."""
        buffer = self.frequencies
        # Tensors that were made in inference mode count no versions.
        version = None if buffer.is_inference() else buffer._version
        scaling = self.scaling
        if self._read is not None and self._angles is not None:
            known, known_version, known_scaling = self._read
            untouched = known is buffer and version is not None and version == known_version
            if untouched and scaling == known_scaling:
                return self._angles
        angles = self.snapshot()
        self._read = (buffer, version, scaling)
        if self._angles is None or not _same(self._angles, angles):
            self._angles = angles
        return self._angles

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put back whatever the module changes in itself while the context is open."""
        attributes = dict(self.module.__dict__)
        buffers = dict(self.module._buffers)
        values = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
        try:
            yield
        finally:
            for now, before in (
                (self.module.__dict__, attributes),
                (self.module._buffers, buffers),
            ):
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)
            for name, value in values.items():
                buffer = self.module.get_buffer(name)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _same(one: RotaryAngles, other: RotaryAngles) -> bool:
    return (
        one.scaling == other.scaling
        and one.frequencies.device == other.frequencies.device
        and torch.equal(one.frequencies, other.frequencies)
    )


def unsupported_rotation(model: nn.Module, reason: str) -> UnsupportedModelError:
    """The error for a model whose rotation cannot be learned, and why."""
    return UnsupportedModelError(
        f"{type(model).__name__} rotates its keys in a way that kvq does not know: {reason}.",
        hint=EXAMPLE,
    )


def find_source(
    model: nn.Module, rotary: Mapping[str, nn.Module], attention: str, layer_type: str | None
) -> RotarySource:
    """The one rotary module in the smallest part of the model that holds it and the attention.

    Args:
        model: for messages.
        rotary: modules with frequencies, by name.
        attention: name of an attention module.
        layer_type: of its layer; None where the model has no types.

    Raises UnsupportedModelError if there is none, or more than one.
    """
    path = attention.split(".")
    for length in range(len(path), -1, -1):
        owner = path[:length]
        sources = [
            source
            for name, module in rotary.items()
            if name.split(".")[:length] == owner
            and (source := _source_of(module, layer_type)) is not None
        ]
        if len(sources) > 1:
            raise unsupported_rotation(
                model,
                f"{'.'.join(owner) or 'it'} has {len(sources)} modules with a buffer "
                f"{FREQUENCIES!r}, expected one",
            )
        if sources:
            return sources[0]
    raise unsupported_rotation(
        model, f"no module with a buffer {FREQUENCIES!r} was found for {attention}, expected one"
    )


def _source_of(module: nn.Module, layer_type: str | None) -> RotarySource | None:
    buffers = module._buffers
    if buffers.get(FREQUENCIES) is not None:
        return RotarySource(module, None)
    if layer_type is not None and buffers.get(f"{layer_type}_{FREQUENCIES}") is not None:
        return RotarySource(module, layer_type)
    return None
