"""The pre-RoPE seam: where kvq reaches a stock transformers model, and the only place that does.

A decoder's attention module projects, rotates queries and keys with the function
``apply_rotary_pos_emb`` of its modeling file, updates the cache, and calls the attention function
that the configuration names. ``tap_attention`` puts itself between: an ``AttentionTap`` sees keys
and queries before RoPE and decides what goes on, and sees what attention is about to attend over.
It works the same for separate and fused projections and with or without k-norm, because it takes
the arguments of calls and not the outputs of named submodules. On exit the model is the stock model
again.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvq_formats.errors import KVQError, UnsupportedModelError

ROTARY_FUNCTION = "apply_rotary_pos_emb"
PREFIX = "kvq_tap_"
"""Attention implementations that kvq registers while a tap is in place."""

_tap_numbers = itertools.count()


MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class RotaryCall:
    """One layer is about to rotate its queries and keys.

    Fields:
        layer_idx: index of the layer.
        query: ``[B, HQ, T, D]``, before RoPE, model dtype.
        key: ``[B, H, T, D]``, before RoPE and after any k-norm.
        rotate: the model's own rotation at these positions, ``(query, key) -> (query, key)``.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AttentionCall:
    """One layer is about to attend.

    Fields:
        layer_idx: index of the layer.
        rotated: whether the layer has rotated its keys.
        query: ``[B, HQ, T, D]``; key, value: ``[B, H, S, D]``, as the cache returned them.
        options: what the model passes on: scaling, softcap, s_aux, sliding_window, ...
        attend: the model's own attention, ``(query, key, value) -> (output [B, T, HQ, D],
            weights or None)``.
    """

    layer_idx: int
    rotated: bool
    query: Tensor
    key: Tensor
    value: Tensor
    options: Mapping[str, Any]
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class AttentionTap:
    """Sees every attention layer of a model; as it stands it changes nothing."""

    def on_forward(self, arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Called before each forward of the decoder with its arguments by name.

        Returns arguments to replace, if any.
        """

    def on_positions(self, position_ids: Tensor) -> None:
        """Called as the model asks for the rotation of positions, i64 ``[B or 1, T]``."""

    def mask_function(self, stock: MaskFunction) -> MaskFunction:
        """What makes the masks of a forward, as transformers' mask interface calls it."""
        return stock

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        """Return the query and key that go on to the cache and to attention."""
        return call.rotate(call.query, call.key)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Return what attention returns."""
        return call.attend(call.query, call.key, call.value)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules by layer index."""
    return {
        layer_index(module): module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and type(module).__name__.endswith("Attention")
    }


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that turn positions into cosines and sines: those that hold frequencies."""
    return [
        module
        for module in model.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def layer_index(attention: nn.Module) -> int:
    """Index of the layer that an attention module belongs to."""
    return cast(int, attention.layer_idx)


@dataclass
class _Progress:
    """Where a tapped forward is.

    Fields:
        layer_idx: layer whose attention module runs, None between them.
        rotated: (H, D) of the keys that the layer rotated, None if it has not.
    """

    layer_idx: int | None = None
    rotated: tuple[int, int] | None = None


def _wrap_rotary(rotary: Callable[..., Any], tap: AttentionTap, progress: _Progress) -> Any:
    def tapped_rotary(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The function is shared by all models of the file; those that are not tapped pass by.
        if progress.layer_idx is None:
            return rotary(q, k, *args, **kwargs)
        progress.rotated = (k.shape[1], k.shape[-1])
        call = RotaryCall(
            layer_idx=progress.layer_idx,
            query=q,
            key=k,
            rotate=lambda query, key: rotary(query, key, *args, **kwargs),
        )
        return tap.on_rotary(call)

    return tapped_rotary


@contextmanager
def _rotary_tapped(file: Any, tap: AttentionTap, progress: _Progress) -> Iterator[None]:
    """Replace the rotary function of one modeling file."""
    original = getattr(file, ROTARY_FUNCTION)
    setattr(file, ROTARY_FUNCTION, _wrap_rotary(original, tap, progress))
    try:
        yield
    finally:
        setattr(file, ROTARY_FUNCTION, original)


@contextmanager
def _attention_tapped(
    model: PreTrainedModel, tap: AttentionTap, progress: _Progress
) -> Iterator[None]:
    """Register an attention implementation that asks the tap, and switch the model to it."""
    original = model.config._attn_implementation
    # A name of its own: the registry is global, and another model may be tapped meanwhile.
    name = f"{PREFIX}{next(_tap_numbers)}_{original}"

    def tapped_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended = (key.shape[1], key.shape[-1])
        if progress.rotated not in (None, attended):
            raise UnsupportedModelError(
                f"{type(model).__name__} rotates keys of (heads, channels) {progress.rotated} and "
                f"attends over {attended}; keys of which a part bypasses RoPE are not supported."
            )
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
        call = AttentionCall(
            layer_idx=layer_index(module),
            rotated=progress.rotated is not None,
            query=query,
            key=key,
            value=value,
            options=options,
            attend=lambda q, k, v: stock(module, q, k, v, attention_mask, **options),
        )
        return tap.on_attention(call)

    # Without a mask function of its own a custom implementation gets no mask at all, and causality
    # vanishes without a word: the tap uses the one of the implementation that it stands for.
    AttentionInterface.register(name, tapped_attention)
    AttentionMaskInterface.register(name, tap.mask_function(ALL_MASK_ATTENTION_FUNCTIONS[original]))
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


@contextmanager
def tap_attention(model: PreTrainedModel, tap: AttentionTap) -> Iterator[None]:
    """Let ``tap`` see every attention layer of ``model`` while the context is open.

    Raises:
        UnsupportedModelError: no attention module was found, its modeling file has no rotary
            function of queries and keys, or the model does not use transformers' attention
            interface. A forward raises it where keys are rotated in part.
        KVQError: the model is tapped already.
    """
    modules = attention_modules(model)
    name = type(model).__name__
    if not modules:
        raise UnsupportedModelError(f"{name} has no attention layers that kvq understands.")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface, so its cache cannot be "
            "reached.",
            hint="models with an attention interface: Llama, Mistral, Qwen, Phi-3, Gemma, ...",
        )
    if str(model.config._attn_implementation).startswith(PREFIX):
        raise KVQError(
            f"kvq is attached to this {name} already.",
            hint="leave the first `with kvq.attach(...)` before you enter another",
        )
    files = {sys.modules[type(module).__module__] for module in modules.values()}
    for file in files:
        if not hasattr(file, ROTARY_FUNCTION):
            raise UnsupportedModelError(
                f"{name} rotates its keys in a way that kvq does not know: "
                f"{file.__name__} has no {ROTARY_FUNCTION}."
            )
        if "k" not in inspect.signature(getattr(file, ROTARY_FUNCTION)).parameters:
            raise UnsupportedModelError(
                f"{name} rotates its keys in a way that kvq does not know: {ROTARY_FUNCTION} of "
                f"{file.__name__} does not take queries and keys together."
            )

    progress = _Progress()
    decoder = model.base_model
    signature = inspect.signature(decoder.forward)
    rest = next(
        (p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "kwargs"
    )

    def enter_layer(module: nn.Module, _args: Any) -> None:
        progress.layer_idx, progress.rotated = layer_index(module), None

    def leave_layer(_module: nn.Module, _args: Any, _output: Any) -> None:
        progress.layer_idx = None

    def enter_forward(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        # By name, all of them: what wraps a forward looks for its options among the keywords.
        named = dict(signature.bind_partial(*args, **kwargs).arguments)
        named |= named.pop(rest, {})
        replaced = tap.on_forward(named)
        return None if replaced is None else ((), {**named, **replaced})

    def enter_rotary(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        if (position_ids := bound.arguments.get("position_ids")) is not None:
            tap.on_positions(position_ids)

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(enter_layer).remove)
            stack.callback(module.register_forward_hook(leave_layer, always_call=True).remove)
        stack.callback(decoder.register_forward_pre_hook(enter_forward, with_kwargs=True).remove)
        for rotary in rotary_modules(decoder):
            hook = rotary.register_forward_pre_hook(enter_rotary, with_kwargs=True)
            stack.callback(hook.remove)
        for file in files:
            stack.enter_context(_rotary_tapped(file, tap, progress))
        stack.enter_context(_attention_tapped(model, tap, progress))
        yield
