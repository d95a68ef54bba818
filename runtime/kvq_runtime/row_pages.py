"""Pages of one row as attention reads them: decoded and rotated block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvq_kernels.attention import DecodedPages
from kvq_kernels.rotary import RotaryAngles, rotate
from kvq_runtime.page_pool import PagePool
from kvq_runtime.rows import Row


class PooledPages:
    """The pages that ``row`` names in ``pool``; a ``kvq_kernels.attention.RowPages``."""

    def __init__(self, pool: PagePool, row: Row, angles: RotaryAngles) -> None:
        self.pool = pool
        self.row = row
        self.angles = angles

    @property
    def lengths(self) -> Sequence[int]:
        """Valid tokens of each page."""
        return self.row.lengths

    @property
    def ends(self) -> Sequence[int]:
        """Index of each page's last valid token."""
        return self.row.ends

    def read(self, first: int, last: int) -> DecodedPages:
        """Decode pages ``first`` to ``last - 1`` and rotate their keys.

        They are there until the next are read.
        """
        pages = self.row.pages[first:last]
        runs = list(self.pool.read(pages))
        if len(runs) == 1:
            keys, values, half_range, center, base = self._decode(*runs[0])
        else:
            # Each is decoded to where the one before lies.
            parts = [[_copy(part) for part in self._decode(*run)] for run in runs]
            keys, values, half_range, center, base = (
                None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)
            )
        cos, sin = self.angles.page_cos_sin(base)
        for place, page in enumerate(pages):
            if (positions := self.pool.positions_of(page)) is not None:
                cos[place], sin[place] = self.angles.cos_sin(positions)
        # The numbers were made for this reading, so that they can be turned where they are.
        rotate(keys, cos[:, None], sin[:, None], out=keys)
        return DecodedPages(keys, values, half_range, center)

    def _decode(self, key: Any, value: Any) -> tuple[Any, Any, Any, Any, Any]:
        codec = self.pool.codec
        return codec.decode_keys(key), *codec.decode_values(value), key.base_positions


def _copy(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clone()
