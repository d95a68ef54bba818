"""Devices that are pretended: tensors of real numbers that say that they lie on ``cuda:1``.

A machine without GPUs can so tell whether a program keeps each tensor where it belongs. Inside
``labelled_devices()`` every way to name a device works for ``cuda:N`` too: factories, ``.to``,
``.cpu()``, ``copy_``. What mixes devices raises as it would on CUDA; what reads numbers on the host
(``item``, ``tolist``, ``bool``) works as there, and ``numpy`` fails as there.

A labelled tensor wraps a plain one on the CPU, which does all of the arithmetic: the same
operations on the same numbers, so that results are those of the CPU, bit for bit. To torch it lies
on the device type ``lazy``, which no build has kernels for, but for which autograd runs in the
calling thread; to everybody who asks it in Python it lies on ``cuda``. ``_Names`` translates what
is said in Python, ``_Mixing`` sees each operation that torch makes of it.

Not pretended: random numbers (those of the CPU's generator), streams and memory. Refused: the fused
attention of ``F.scaled_dot_product_attention``, which torch picks by device; models are to run with
``attn_implementation="eager"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from device_rules import CPU, common_device, tensors_in, torch_device, written_by

NAME = "cuda"
"""What the devices are called."""

HIDDEN = "lazy"
"""What torch takes them for."""

aten = torch.ops.aten


class LabelledTensor(torch.Tensor):
    """A tensor that says that it lies elsewhere; ``inner`` is a plain one and has its numbers."""

    inner: Tensor
    # Not asked for by torch.Tensor's own, which would make labelled tensors of plain results.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, hidden: torch.device) -> LabelledTensor:
        """``hidden``: on the device type that torch knows."""
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=hidden,
        )
        wrapped.inner = inner
        return wrapped

    @property
    def device(self) -> torch.device:
        """The device that is pretended."""
        return torch.device(NAME, torch_device(self).index)

    @property
    def is_cuda(self) -> bool:
        return True

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"{self.device}: {self.inner!r}"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


@contextmanager
def labelled_devices() -> Iterator[None]:
    """Let ``cuda:N`` be a device, for every N, in this thread."""
    # torch.tensor makes its numbers on the CPU and moves them in sight of the modes.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    # Operations that torch takes apart where a device has no kernel of its own, and computes
    # otherwise on the CPU and on CUDA.
    kernels = torch.library.Library("aten", "IMPL")
    for name in ("silu_backward", "mish_backward", "native_channel_shuffle"):
        kernels.impl(name, _no_kernel, HIDDEN.capitalize())
    try:
        with _Mixing(), _Names():
            yield
    finally:
        kernels._destroy()
        torch._C._set_only_lift_cpu_tensors(before)


def _no_kernel(*_: Any, **__: Any) -> Any:
    raise AssertionError("an operation on a labelled tensor was not seen")


class _Names(TorchFunctionMode):
    """Names of pretended devices become those that torch knows."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            # Runs hooks, and layers once more that were checkpointed: in sight of this mode, which
            # is out of force while it handles a function.
            with self:
                return _backward(*args, **kwargs)
        if func is scaled_dot_product_attention and type(args[0]) is LabelledTensor:
            raise NotImplementedError("fused attention of labelled tensors; take an eager one")
        if func is torch.Tensor.cuda:
            func, index = torch.Tensor.to, args[1] if len(args) > 1 else kwargs.pop("device", None)
            where = torch.device(NAME, index) if isinstance(index, int) else index or NAME
            args = (args[0], where, *args[2:])
        if func is torch.Tensor.to:
            args = (args[0], *map(_hidden, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _hidden(kwargs["device"])
        return func(*args, **kwargs)


def _backward(loss: Tensor, **asked: Any) -> None:
    """``loss.backward()``; the public functions ask for modes, and so come back to where we are."""
    if any(asked.values()):
        raise NotImplementedError(f"backward with {asked}")
    ones = torch.ones_like(loss)
    options = {"allow_unreachable": True, "accumulate_grad": True}
    _engine_run_backward((loss,), (ones,), False, False, (), **options)


class _Mixing(TorchDispatchMode):
    """Sees each operation: runs it on the numbers, if they lie on one device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _hidden(given: Any) -> Any:
    """The device that torch knows for a pretended one; anything else as it is."""
    if isinstance(given, str) and given.partition(":")[0] == NAME:
        given = torch.device(given)
    if isinstance(given, torch.device) and given.type == NAME:
        return torch.device(HIDDEN, given.index or 0)
    return given


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of torch: its device, its numbers, and labels on what comes of it."""
    asked = kwargs.get("device")
    is_pretended = asked is not None and asked.type == HIDDEN
    given = list(tensors_in((*args, *kwargs.values())))
    if not is_pretended and not any(type(x) is LabelledTensor for x in given):
        return func(*args, **kwargs)
    written = written_by(func, args, kwargs)
    # Copies go from any device to any other.
    if func is aten.copy_.default or func is aten._to_copy.default:
        found = torch_device(args[0])
    else:
        found = common_device(func, args, given, written)
    device = found if asked is None else asked
    if is_pretended:
        kwargs["device"] = CPU
    result = func(*_plain(args), **{name: _plain(value) for name, value in kwargs.items()})
    for x in written:
        # A wrapper cannot follow what changes the shape of its tensor in place.
        if type(x) is LabelledTensor and (x.shape, x.stride()) != (x.inner.shape, x.inner.stride()):
            raise NotImplementedError(f"{func} changes the shape of a labelled tensor in place")
    if device.type != HIDDEN:
        return result
    # What was written to comes back as the same tensor.
    return _labelled(result, device, [x for x in written if type(x) is LabelledTensor])


def _plain(value: Any) -> Any:
    """The same with plain tensors."""
    if type(value) is LabelledTensor:
        return value.inner
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def _labelled(value: Any, device: torch.device, known: list[LabelledTensor]) -> Any:
    """The same with labels; a tensor that a known one has wrapped already keeps that one."""
    if isinstance(value, Tensor):
        same = next((x for x in known if x.inner is value), None)
        return LabelledTensor(value, device) if same is None else same
    if isinstance(value, list | tuple):
        return type(value)(_labelled(part, device, known) for part in value)
    return value
