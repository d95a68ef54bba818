"""Which tensors an operation of torch may take together, as it is on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
aten = torch.ops.aten


def torch_device(x: Tensor) -> torch.device:
    """Where a tensor is to torch, whatever its class says."""
    return torch.Tensor.device.__get__(x)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors among the arguments of an operation, those in lists included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


@cache
def _writing_arguments(func: Any) -> list[tuple[int, str]]:
    return [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def written_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    places = _writing_arguments(func)
    return list(tensors_in(args[i] if i < len(args) else kwargs.get(name) for i, name in places))


BRACKETS = frozenset(
    {
        aten.index.Tensor,
        aten._unsafe_index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
        aten._unsafe_index_put.default,
    }
)


TAKE_NUMBERS = BRACKETS | {
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.fill.Tensor,
    aten.fill_.Tensor,
    aten.floor_divide.default,
    aten.floor_divide_.Tensor,
}


@cache
def _takes_numbers(func: Any) -> bool:
    """Whether a single number on the CPU goes with tensors elsewhere, as on CUDA."""
    pointwise = torch.Tag.pointwise in func.tags and func is not aten.equal.default
    return pointwise or func in TAKE_NUMBERS


def common_device(func: Any, args: Any, given: list[Tensor], written: list[Tensor]) -> torch.device:
    """The one device, as torch knows it, of all tensors that an operation is given.

    As on CUDA, single numbers on the CPU go with any device, and so does what stands in brackets,
    but only to be read. Raises RuntimeError.
    """
    fixed = {id(x) for x in written}
    free = {id(x) for x in tensors_in(args[1])} if func in BRACKETS else set()
    takes_numbers = _takes_numbers(func)
    found: Tensor | None = None
    for x in given:
        goes_anywhere = (x.dim() == 0 and takes_numbers) or id(x) in free
        if goes_anywhere and torch_device(x) == CPU and id(x) not in fixed:
            continue
        if found is not None and x.device != found.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{found.device} and {x.device}! (in {func})"
            )
        found = x
    return CPU if found is None else torch_device(found)
