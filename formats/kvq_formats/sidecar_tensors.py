"""The numbers of a sidecar: layers to named tensors and back, and every check on the way back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.feedback import Feedback
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.parameters import KeyParameters, LayerParameters, ValueParameters

KEY_TENSORS = ("center", "half_range")
CODEBOOK_TENSORS = (
    "codebook",
    "codebook_levels",
    "codebook_offset",
    "codebook_step",
    "outlier_step",
    "qnorm_scale",
    "qnorm_shift",
)

FEEDBACK_TENSORS = ("feedback_order", "feedback_gains")
"""Optional: without them each number is rounded by itself."""

FEEDBACK_SHIFT = "feedback_shift"
"""Always written with feedback; files from before there was a shift have none, which is zeros."""

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.int16: "I16", torch.uint8: "U8"}
"""safetensors' words."""


class DamagedTensorsError(ValueError):
    """Tensors that no calibration can have written; the text says which and why."""


def layer_tensors(layers: Mapping[int, LayerParameters]) -> dict[str, Tensor]:
    """Named tensors of format 1, contiguous, on the CPU.

    f32, but u8 for ``codebook_levels``, i16 for ``feedback_order`` and f16 for ``feedback_gains``.
    """
    tensors: dict[str, Tensor] = {}
    for layer_idx, layer in sorted(layers.items()):
        key = f"layers.{layer_idx}.key."
        tensors[key + "center"] = _f32(layer.key.center)
        tensors[key + "half_range"] = _f32(layer.key.half_range)
        _add_codebook(tensors, key, layer.key.codebook, layer.key.outlier_step)
        _add_feedback(tensors, key, layer.key.feedback)
        value = f"layers.{layer_idx}.value."
        _add_codebook(tensors, value, layer.value.codebook, layer.value.outlier_step)
        _add_feedback(tensors, value, layer.value.feedback)
    return tensors


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over the tensors by name: a line ``name dtype [shape]``, then the bytes.

    The dtype is safetensors' word (F32, F16, I16, U8), the shape is written as JSON without spaces.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        dtype = DTYPES[tensor.dtype]
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{name} {dtype} [{shape}]\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def layers_from_tensors(
    tensors: Mapping[str, Tensor], config: KVQConfig, fingerprint: Fingerprint
) -> dict[int, LayerParameters]:
    """Parameters of each layer; raises DamagedTensorsError where they cannot be right.

    Checked: names (all of a layer, none besides), dtypes, shapes (``[H, D]`` of the fingerprint,
    ``[N]`` of the layer's widths), finite numbers, ``half_range`` > 0, entries strictly
    increasing, levels not decreasing, steps > 0, ``layer_bits`` of these layers, and orders of
    feedback that name every channel of a head once.
    """
    indices = _layer_indices(tensors, fingerprint)
    H, D = fingerprint.num_kv_heads, fingerprint.head_dim
    if config.layer_bits and list(config.layer_bits) != indices:
        raise DamagedTensorsError(
            f"its layer_bits are of layers {list(config.layer_bits)}, its tensors of {indices}"
        )
    layers = {}
    for layer_idx in indices:
        widths = config.for_layer(layer_idx)
        key = f"layers.{layer_idx}.key."
        center = _take(tensors, key + "center", (H, D))
        half_range = _take(tensors, key + "half_range", (H, D))
        if not (half_range > 0).all():
            raise DamagedTensorsError(f"{key}half_range has an entry that is not positive")
        key_codebook, key_step = _take_codebook(tensors, key, widths.key_bits)
        value = f"layers.{layer_idx}.value."
        value_codebook, value_step = _take_codebook(tensors, value, widths.value_bits)
        layers[layer_idx] = LayerParameters(
            key=KeyParameters(
                center, half_range, key_codebook, key_step, _take_feedback(tensors, key, H, D)
            ),
            value=ValueParameters(value_codebook, value_step, _take_feedback(tensors, value, H, D)),
        )
    return layers


def _f32(tensor: Tensor) -> Tensor:
    # A copy: layers may share a codebook, but tensors of a file may not share memory.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _add_codebook(
    tensors: dict[str, Tensor], prefix: str, codebook: Codebook, outlier_step: float
) -> None:
    tensors[prefix + "codebook"] = _f32(codebook.entries)
    tensors[prefix + "codebook_levels"] = codebook.levels.to(
        "cpu", torch.uint8, copy=True
    ).contiguous()
    scalars = {
        "codebook_offset": codebook.offset,
        "codebook_step": codebook.step,
        "outlier_step": outlier_step,
        "qnorm_scale": codebook.qnorm_scale,
        "qnorm_shift": codebook.qnorm_shift,
    }
    for name, number in scalars.items():
        tensors[prefix + name] = torch.tensor([number], dtype=torch.float32)


def _add_feedback(tensors: dict[str, Tensor], prefix: str, feedback: Feedback | None) -> None:
    if feedback is not None:
        order, gains = (it.to("cpu", copy=True) for it in (feedback.order, feedback.gains))
        tensors[prefix + "feedback_order"] = order.to(torch.int16).contiguous()
        tensors[prefix + "feedback_gains"] = gains.contiguous()
        tensors[prefix + FEEDBACK_SHIFT] = _f32(feedback.shift)


def _take_feedback(tensors: Mapping[str, Tensor], prefix: str, H: int, D: int) -> Feedback | None:
    if prefix + "feedback_order" not in tensors:
        return None
    order = _take(tensors, prefix + "feedback_order", (H, D), torch.int16).long()
    if not torch.equal(order.sort(dim=-1).values, torch.arange(D).expand(H, D)):
        raise DamagedTensorsError(f"{prefix}feedback_order does not name every channel once")
    gains = _take(tensors, prefix + "feedback_gains", (H, D * (D - 1) // 2), torch.float16)
    shift = torch.zeros(H, D)
    if prefix + FEEDBACK_SHIFT in tensors:
        shift = _take(tensors, prefix + FEEDBACK_SHIFT, (H, D))
    return Feedback(order, gains, shift)


def _layer_indices(tensors: Mapping[str, Tensor], fingerprint: Fingerprint) -> list[int]:
    indices = set()
    for name in tensors:
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "layers" or not parts[1].isdecimal():
            raise DamagedTensorsError(f"it has a tensor {name} that no sidecar has")
        indices.add(int(parts[1]))
    if not indices:
        raise DamagedTensorsError("it holds no layer")
    if max(indices) >= fingerprint.num_hidden_layers:
        raise DamagedTensorsError(
            f"it has a layer {max(indices)}, but the model has {fingerprint.num_hidden_layers}"
        )
    expected = {
        f"layers.{layer_idx}.{part}"
        for layer_idx in indices
        for part in (
            *(f"key.{name}" for name in KEY_TENSORS + CODEBOOK_TENSORS),
            *(f"value.{name}" for name in CODEBOOK_TENSORS),
        )
    }
    for prefix in [f"layers.{i}.{what}." for i in indices for what in ("key", "value")]:
        together = {prefix + name for name in FEEDBACK_TENSORS}
        shift = {prefix + FEEDBACK_SHIFT} & set(tensors)
        if shift or together & set(tensors):
            expected |= together | shift
    if missing := sorted(expected - set(tensors)):
        raise DamagedTensorsError(f"its tensor {missing[0]} is missing")
    if unknown := sorted(set(tensors) - expected):
        raise DamagedTensorsError(f"it has a tensor {unknown[0]} that no sidecar has")
    return sorted(indices)


def _take(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise DamagedTensorsError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise DamagedTensorsError(f"{name} has an entry that is not finite")
    return tensor


def _take_codebook(tensors: Mapping[str, Tensor], prefix: str, bits: int) -> tuple[Codebook, float]:
    N = 1 << bits
    entries = _take(tensors, prefix + "codebook", (N,))
    levels = _take(tensors, prefix + "codebook_levels", (N,), torch.uint8)
    if not (entries[1:] > entries[:-1]).all():
        raise DamagedTensorsError(f"{prefix}codebook does not increase from entry to entry")
    if not (levels[1:] >= levels[:-1]).all():
        raise DamagedTensorsError(f"{prefix}codebook_levels decreases")
    scalars = {name: float(_take(tensors, prefix + name, (1,))) for name in CODEBOOK_TENSORS[2:]}
    for name in ("codebook_step", "outlier_step"):
        if scalars[name] <= 0:
            raise DamagedTensorsError(f"{prefix}{name} is {scalars[name]:g}, expected more than 0")
    codebook = Codebook(
        entries=entries,
        levels=levels,
        offset=scalars["codebook_offset"],
        step=scalars["codebook_step"],
        qnorm_scale=scalars["qnorm_scale"],
        qnorm_shift=scalars["qnorm_shift"],
    )
    return codebook, scalars["outlier_step"]
