"""Sensitivity: the squared gradient of the loss at every key and value (KVQuant, section 3.3).

``F = (d loss / d x)^2`` of the causal language-modelling loss, taken at pre-RoPE keys and at
values. Weights are frozen and gradients flow through activations only; layers are recomputed in the
backward pass (gradient checkpointing), so that an 8B model fits one 24 GB card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvq_calibration.capture import KeyValueTap, evaluation_mode
from kvq_calibration.far_gradients import FarGradientTap
from kvq_calibration.packed_weights import check_differentiable
from kvq_calibration.token_loss import loss_by_rows
from kvq_formats.errors import CalibrationError
from kvq_runtime.offload import input_device, is_offloaded

FIRST_LOSS_SCALE = 2.0**6
LAST_LOSS_SCALE = 2.0**-18

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps how a module recomputes."""

EMBEDDING_HOOKS = ("_require_grads_hooks", "_require_grads_hook")
"""Where transformers keeps what it hooked to the embeddings for that."""


@contextmanager
def activation_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Freeze the weights, let gradients start at the embeddings, checkpoint the layers.

    Only the checkpointed layers themselves are put in training mode, which is what switches
    recomputation on; dropout and everything else below them stays in evaluation mode.

    Raises CalibrationError for weights that gradients do not pass through.
    """
    check_differentiable(model)
    checkpointing = [
        (module, module.gradient_checkpointing, getattr(module, CHECKPOINT_FUNCTION, None))
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    wanted = [
        (module, name, weight.requires_grad)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
    ]
    with ExitStack() as stack:

        def restore() -> None:
            # By name: offloaded weights are other objects after each forward.
            for module, name, requires_grad in wanted:
                module.get_parameter(name).requires_grad_(requires_grad)
            for module, enabled, function in checkpointing:
                module.gradient_checkpointing = enabled
                if function is not None:
                    setattr(module, CHECKPOINT_FUNCTION, function)

        stack.callback(restore)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.enable_grad())
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings()
        hook = embeddings.register_forward_hook(_require_gradient)
        stack.callback(hook.remove)
        if is_offloaded(model):
            # A recomputation that stops at what it was for, in the middle of the last linear layer,
            # would leave that layer's weights on the device.
            stack.enter_context(set_checkpoint_early_stop(False))
        if model.supports_gradient_checkpointing:
            # transformers 5.23 renamed both methods and warns about the older names.
            names = ("activation_checkpointing", "gradient_checkpointing")
            name = next(name for name in names if hasattr(model, f"{name}_enable"))
            own = {hook: vars(model)[hook] for hook in EMBEDDING_HOOKS if hook in vars(model)}
            getattr(model, f"{name}_enable")({"use_reentrant": False})
            stack.callback(_remove_embedding_hooks, model, own)
            stack.callback(getattr(model, f"{name}_disable"))
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        yield


def _remove_embedding_hooks(model: PreTrainedModel, own: dict[str, Any]) -> None:
    """What transformers leaves on the embeddings when checkpointing ends, but not the caller's."""
    if vars(model).get(EMBEDDING_HOOKS[0]) is not own.get(EMBEDDING_HOOKS[0]):
        model.disable_input_require_grads()
    for name in EMBEDDING_HOOKS:
        vars(model).pop(name, None)
    vars(model).update(own)


def _require_gradient(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


class LossScale:
    """Keeps fp16 gradients between underflow and overflow; 1 for other dtypes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.adjustable = dtype == torch.float16
        self.value = FIRST_LOSS_SCALE if self.adjustable else 1.0

    def lower(self) -> bool:
        """Lower the scale after an overflow; False where that cannot help."""
        self.value /= 16
        return self.adjustable and self.value >= LAST_LOSS_SCALE


def backward(model: PreTrainedModel, tap: KeyValueTap, input_ids: Tensor, scale: LossScale) -> None:
    """Run one batch forth and back: ``tap`` then holds keys and values with their gradients.

    The loss is summed over tokens, so that batches of unlike sizes weigh alike, and multiplied by
    ``scale``, which is lowered until gradients are finite.

    Raises: CalibrationError when they never are.
    """
    ids = input_ids.to(input_device(model))
    while True:
        tap.start()
        with loss_by_rows(model, scale.value):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        tap.stop()
        predicted = ids.shape[0] * (ids.shape[1] - 1)
        (loss * (predicted * scale.value)).backward()
        overflow = [layer for layer in tap.layers if not _finite_gradients(tap, layer)]
        if not overflow:
            return
        if not scale.lower():
            raise CalibrationError(
                f"gradients of layer {overflow[0]} are NaN or infinite (loss {loss.item():.4g}).",
                hint="--dtype bfloat16 or float32, or --sensitivity none",
            )


def layer_gradients(tap: KeyValueTap, layer_idx: int, scale: LossScale) -> tuple[Tensor, Tensor]:
    """Gradients of the loss at one layer's keys and values, f32 ``[B, H, T, D]``.

    After ``backward``; one layer at a time: those of all layers in f32 would be the largest thing
    in memory.
    """
    key, value = _gradients(tap, layer_idx)
    return key.float() / scale.value, value.float() / scale.value


def far_gradients(
    tap: FarGradientTap, layer_idx: int, scale: LossScale
) -> tuple[Tensor, Tensor] | None:
    """Gradients as ``layer_gradients``, through queries of later pages; None where none are."""
    if layer_idx not in tap.far:
        return None
    key, value = tap.far.pop(layer_idx)
    return key.float() / scale.value, value.float() / scale.value


def squared_gradients(tap: KeyValueTap, layer_idx: int, scale: LossScale) -> tuple[Tensor, Tensor]:
    """``F`` of one layer's keys and values, f32 ``[B, H, T, D]``, after ``backward``."""
    key, value = layer_gradients(tap, layer_idx, scale)
    return key.square(), value.square()


def _gradients(tap: KeyValueTap, layer_idx: int) -> tuple[Tensor, Tensor]:
    key, value = tap.keys[layer_idx].gradient(), tap.values[layer_idx].grad
    if key is None or value is None:
        raise CalibrationError(f"no gradient reached layer {layer_idx}.")
    return key, value


def _finite_gradients(tap: KeyValueTap, layer_idx: int) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in _gradients(tap, layer_idx))
