"""The pre-RoPE seam: where kvq reaches a stock transformers model, and the only place that does.

A decoder's attention module projects, rotates queries and keys with the function
``apply_rotary_pos_emb`` of its modeling file, updates the cache, and calls the attention function
that the configuration names. ``tap_attention`` puts itself between: an ``AttentionTap`` sees keys
and queries before RoPE and decides what goes on, and sees what attention is about to attend over.
It works the same for separate and fused projections and with or without k-norm, because it takes
the arguments of calls and not the outputs of named submodules. On exit the model is the stock model
again.

Models may be tapped at once and left in any order, and each may run in a thread of its own. What
they share is the rotary function of their modeling file: the first replaces it, the last puts it
back, and meanwhile each call goes to the tap of the model whose layer makes it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime.cache_argument import as_taken, with_one_name
from kvq_runtime.turn import Turn

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
        query: ``[B, HQ, T, R]``, before RoPE, model dtype; R < D where the model cuts out a part.
        key: ``[B, H, T, R]``, before RoPE and after any k-norm.
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
        rotary: the rotation that came before; None if the layer has not rotated its keys.
        rotated_key: ``[B, H, T, R]``, what ``on_rotary`` returned for it.
        query: ``[B, HQ, T, D]``; key, value: ``[B, H, S, D]``, as the cache returned them.
        options: what the model passes on: scaling, softcap, s_aux, sliding_window, ...
        attend: the model's own attention, ``(query, key, value) -> (output [B, T, HQ, D],
            weights or None)``.
    """

    layer_idx: int
    rotary: RotaryCall | None
    rotated_key: Tensor | None
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

    def on_output(self, output: Any) -> Any:
        """Return what the decoder returns in place of ``output``."""
        return output

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
class _Layer:
    """An attention layer of a tapped model that is running.

    Fields:
        layer_idx: index of the layer.
        rotary, rotated_key: as in ``AttentionCall``.
    """

    layer_idx: int
    rotary: RotaryCall | None = None
    rotated_key: Tensor | None = None


class _RunningLayers(threading.local):
    """The layers that run in this thread, the innermost last, by the number of their tap.

    Numbers and not taps: what an interrupted forward leaves here keeps no model alive.
    """

    def __init__(self) -> None:
        self.of: dict[int, _Layer] = {}


_running = _RunningLayers()


class _RotaryPatch:
    """Stands in for the rotary function of one modeling file while models of it are tapped."""

    def __init__(self, file: ModuleType) -> None:
        self.file = file
        self.taps: dict[int, AttentionTap] = {}
        self.stock: Callable[..., tuple[Tensor, Tensor]] = getattr(file, ROTARY_FUNCTION)

        # With the signature of the stock function: whoever attaches next inspects it.
        @functools.wraps(self.stock)
        def tapped_rotary(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return self.rotate(*args, **kwargs)

        self.function = tapped_rotary

    def install(self) -> None:
        """Replace the stock function."""
        setattr(self.file, ROTARY_FUNCTION, self.function)

    def restore(self) -> None:
        """Put the stock function back, unless somebody else has put theirs on top meanwhile."""
        if getattr(self.file, ROTARY_FUNCTION, None) is self.function:
            setattr(self.file, ROTARY_FUNCTION, self.stock)

    def rotate(self, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Ask the tap of the model whose layer calls."""
        number = self.running()
        # The function is shared by all models of the file; those that are not tapped pass by.
        if number is None or (tap := self.taps.get(number)) is None:
            return self.stock(q, k, *args, **kwargs)
        layer = _running.of[number]
        layer.rotary = call = RotaryCall(
            layer_idx=layer.layer_idx,
            query=q,
            key=k,
            rotate=lambda query, key: self.stock(query, key, *args, **kwargs),
        )
        query, layer.rotated_key = tap.on_rotary(call)
        return query, layer.rotated_key

    def running(self) -> int | None:
        """Number of the tap whose model runs in this thread, the innermost; None if there is none.

        One that has been left does not count: a forward may have been interrupted in a layer.
        """
        return next((number for number in reversed(_running.of) if number in self.taps), None)


_patches: dict[ModuleType, _RotaryPatch] = {}
"""The modeling files of which models are tapped now."""

# Models are attached in any thread; re-entrant, for a collected attachment is left wherever the
# collector happens to run.
_patching = threading.RLock()


@contextmanager
def _rotary_tapped(file: ModuleType, number: int, tap: AttentionTap) -> Iterator[None]:
    """Let ``tap`` have the rotary calls of one modeling file that its own model makes."""
    with _patching:
        if file not in _patches:
            _patches[file] = _RotaryPatch(file)
            _patches[file].install()
        patch = _patches[file]
        patch.taps[number] = tap
    try:
        yield
    finally:
        with _patching:
            del patch.taps[number]
            if not patch.taps:
                del _patches[file]
                patch.restore()


@contextmanager
def _attention_tapped(model: PreTrainedModel, number: int, tap: AttentionTap) -> Iterator[None]:
    """Register an attention implementation that asks the tap, and switch the model to it."""
    original = model.config._attn_implementation
    # A name of its own: the registry is global, and another model may be tapped meanwhile.
    name = f"{PREFIX}{number}_{original}"

    def tapped_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = _running.of.get(number)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
        call = AttentionCall(
            layer_idx=layer_index(module),
            rotary=None if layer is None else layer.rotary,
            rotated_key=None if layer is None else layer.rotated_key,
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
def _layers_followed(modules: Collection[nn.Module], number: int) -> Iterator[None]:
    """Know which attention layer runs, in each thread."""

    def enter(module: nn.Module, _args: Any) -> None:
        # Out first: what an interrupted forward left there is not the innermost any more.
        _running.of.pop(number, None)
        _running.of[number] = _Layer(layer_index(module))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        _running.of.pop(number, None)

    with ExitStack() as stack:
        stack.callback(_running.of.pop, number, None)
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def named_arguments(
    function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, those that the function takes with ``**`` among them."""
    signature = inspect.signature(function)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


@contextmanager
def _forwards_followed(decoder: nn.Module, tap: AttentionTap) -> Iterator[None]:
    """Tell the tap of each forward of the decoder, one at a time, and of its positions."""
    turn = Turn(decoder)
    forward = decoder.forward

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        turn.take()
        # By name, all of them: what wraps a forward looks for its options among the keywords.
        named = with_one_name(named_arguments(forward, args, kwargs))
        replaced = tap.on_forward(named)
        return None if replaced is None else ((), as_taken(forward, {**named, **replaced}))

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        turn.give_back()
        # None where the forward failed.
        return None if output is None else tap.on_output(output)

    def enter_rotary(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        if (position_ids := bound.arguments.get("position_ids")) is not None:
            tap.on_positions(position_ids)

    with ExitStack() as stack:
        stack.callback(decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(leave, always_call=True).remove)
        for rotary in rotary_modules(decoder):
            hook = rotary.register_forward_pre_hook(enter_rotary, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _check_can_be_tapped(model: PreTrainedModel, modules: Collection[nn.Module]) -> None:
    """Raise as ``tap_attention`` does, but for what its files lack."""
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


def _rotary_files(model: PreTrainedModel, modules: Collection[nn.Module]) -> set[ModuleType]:
    """The modeling files of the attention modules.

    Raises UnsupportedModelError where one has no rotary function of queries and keys.
    """
    name = type(model).__name__
    files = {sys.modules[type(module).__module__] for module in modules}
    for file in files:
        if not hasattr(file, ROTARY_FUNCTION):
            raise UnsupportedModelError(
                f"{name} has no RoPE that kvq could store keys before: {file.__name__} has no "
                f"{ROTARY_FUNCTION}."
            )
        if "k" not in inspect.signature(getattr(file, ROTARY_FUNCTION)).parameters:
            raise UnsupportedModelError(
                f"{name} rotates its keys in a way that kvq does not know: {ROTARY_FUNCTION} of "
                f"{file.__name__} does not take queries and keys together."
            )
    return files


@contextmanager
def tap_attention(model: PreTrainedModel, tap: AttentionTap) -> Iterator[None]:
    """Let ``tap`` see every attention layer of ``model`` while the context is open.

    Several models may be tapped at once, of one modeling file too, and left in any order.

    Raises:
        UnsupportedModelError: no attention module was found, its modeling file has no rotary
            function of queries and keys, or the model does not use transformers' attention
            interface.
        KVQError: the model is tapped already. A forward raises it while another thread runs one.
    """
    modules = attention_modules(model).values()
    _check_can_be_tapped(model, modules)
    files = _rotary_files(model, modules)
    number = next(_tap_numbers)
    with ExitStack() as stack:
        stack.enter_context(_layers_followed(modules, number))
        stack.enter_context(_forwards_followed(model.base_model, tap))
        for file in files:
            stack.enter_context(_rotary_tapped(file, number, tap))
        stack.enter_context(_attention_tapped(model, number, tap))
        yield
