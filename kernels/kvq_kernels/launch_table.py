"""How a decode step is launched: one table by architecture, bits and head dimension.

Nothing is tried out on the device: the same cache and device run the same code at the same size.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from kvq_formats.errors import ConfigError

Path = Literal["registers", "portable"]
"""``registers``: ``kvq_kernels.nvidia``; ``portable``: ``decode_splits``."""


PATH_VARIABLE = "KVQ_DECODE_PATH"


@dataclass(frozen=True)
class DecodeLaunch:
    """How the main kernel is launched.

    Fields:
        path: which kernel it is.
        warps: of a program.
        programs: that a multiprocessor is given, if there are pages for them: what its registers
            and shared memory hold at a time.
    """

    path: Path
    warps: int
    programs: int


@dataclass(frozen=True)
class _Line:
    """For which layers a launch is. None is any.

    Fields:
        architectures: beginnings of names such as ``sm_90``, ``gfx942``, ``cpu``.
        bits: of keys and values.
        head_dims: D, all of it rotated.
        largest_group: query heads a key/value head.
    """

    architectures: tuple[str, ...]
    bits: Collection[int] | None
    head_dims: Collection[int] | None
    largest_group: int
    launch: DecodeLaunch


TABLE = (
    # 255 registers a lane: eight warps a multiprocessor. The smaller ones have shared memory
    # (12 KiB a program) for seven.
    _Line(("sm_86", "sm_89", "sm_12"), (2, 3, 4), (64, 128, 256), 8,
          DecodeLaunch("registers", 1, 7)),
    _Line(("sm_8", "sm_9", "sm_10", "sm_11"), (2, 3, 4), (64, 128, 256), 8,
          DecodeLaunch("registers", 1, 8)),
    # 64 tokens a group: 16 rows of a matrix instruction a warp.
    _Line(("",), None, None, 16, DecodeLaunch("portable", 4, 2)),
)  # fmt: skip
"""The first line that fits holds."""


def decode_launch(
    architecture: str,
    *,
    bits: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    group_size: int,
    irregular: bool = False,
) -> DecodeLaunch:
    """Launch for keys and values of ``bits``; ``irregular``: the cache has pages that jump.

    With KVQ_DECODE_PATH=portable in the environment all layers take the portable path. Raises
    ConfigError for any other value of it but ``auto``.
    """
    wanted = os.environ.get(PATH_VARIABLE, "auto")
    if wanted not in ("auto", "portable"):
        raise ConfigError(
            f"{PATH_VARIABLE} is {wanted!r}, expected auto or portable.",
            hint=f"unset {PATH_VARIABLE}",
        )
    for line in TABLE if wanted == "auto" else TABLE[-1:]:
        if (
            architecture.startswith(line.architectures)
            and (line.bits is None or set(bits) <= set(line.bits))
            and (
                line.head_dims is None
                or (head_dim in line.head_dims and rotary_dim == head_dim and not irregular)
            )
            and group_size <= line.largest_group
        ):
            return line.launch
    raise AssertionError("the last line takes what check_layer does")
