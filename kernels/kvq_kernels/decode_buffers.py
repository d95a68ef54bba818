"""What a decode step writes down between its kernels: named, shaped and counted in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import triton

from kvq_formats import outliers
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_kernels.decode_exact import EXACT_TILE
from kvq_kernels.launch import architecture, page_splits
from kvq_kernels.launch_table import DecodeLaunch, decode_launch
from kvq_kernels.nvidia.outlier_scratch import Buffer, key_scratch, value_scratch


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of a decode step.

    Fields:
        batch, num_kv_heads, group_size, head_dim: B, H, G, D.
        max_pages: no row has more.
        exact_room: exact tokens that a row has room for.
        splits: programs that share the pages of a row and head.
        key_pool, value_list: entries of outliers, a page and head; 0 for none.
    """

    batch: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    max_pages: int
    exact_room: int
    splits: int
    key_pool: int
    value_list: int

    @property
    def width(self) -> int:
        """Query heads of a group, rounded up to a power of two."""
        return int(triton.next_power_of_2(self.group_size))

    @property
    def exact_tiles(self) -> int:
        """Splits of exact tokens, before those of pages."""
        return int(triton.cdiv(self.exact_room, EXACT_TILE.value))

    @property
    def all_splits(self) -> int:
        """Splits that are merged."""
        return self.exact_tiles + self.splits

    @property
    def weight_tokens(self) -> int:
        """Tokens of a row that have a weight written down, for outliers."""
        return PAGE_TOKENS * self.max_pages if self.key_pool or self.value_list else 0


def decode_buffers(shape: DecodeShape, launch: DecodeLaunch) -> Mapping[str, Buffer]:
    """Buffers by the name that kernels have for them."""
    B, H, G, D = shape.batch, shape.num_kv_heads, shape.group_size, shape.head_dim
    half, single = torch.float16, torch.float32
    fast = launch.path == "registers"
    pages, splits = shape.max_pages, shape.all_splits
    noted = pages if shape.weight_tokens else 0
    buffers: dict[str, Buffer] = {
        "turned": ((B, H, pages if shape.key_pool or not fast else 0, D, shape.width), half),
        "page_queries": ((B, H, pages if fast else 0, shape.width, D), half),
        "sizes": ((B, H, shape.width), single),
        "weights": ((B, H, shape.weight_tokens, G), half),
        "page_max": ((B, H, noted, G), single),
        "page_range": ((B, H, noted), single),
        "split_out": ((B, H, splits, G, D), single),
        "split_max": ((B, H, splits, G), single),
        "split_sum": ((B, H, splits, G), single),
    }
    if fast and shape.key_pool:
        sizes = (shape.width, D, shape.key_pool)
        buffers |= key_scratch(B, H, *sizes, max_pages=pages, splits=shape.splits)
    if fast and shape.value_list:
        buffers |= value_scratch(B, H, shape.width, D, shape.value_list, splits=shape.splits)
    return buffers


def scratch_bytes(
    config: KVQConfig,
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_pages: int,
    exact_room: int,
    device: torch.device,
) -> int:
    """Bytes that ``decode.decode`` holds beside its arguments, its output included.

    Args:
        config: of the pages.
        batch, num_heads, num_kv_heads, head_dim: B, HQ, H, D.
        max_pages: width of the block table.
        exact_room: exact tokens that a row has room for, E.
        device: decides which kernels run, and how many programs share a row.
    """
    sizes: dict[str, int] = {}
    # What a model rotates is not known here, and decides between two paths; a cache whose positions
    # begin to jump goes from one to the other, and a workspace keeps what both have asked for.
    for rotary_dim in (0, head_dim):
        launch = decode_launch(
            architecture(device),
            bits=(config.key_bits, config.value_bits),
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            group_size=num_heads // num_kv_heads,
        )
        splits = page_splits(
            launch, batch=batch, num_kv_heads=num_kv_heads, max_pages=max_pages, device=device
        )
        shape = DecodeShape(
            batch=batch,
            num_kv_heads=num_kv_heads,
            group_size=num_heads // num_kv_heads,
            head_dim=head_dim,
            max_pages=max_pages,
            exact_room=exact_room,
            splits=splits,
            key_pool=outliers.key_pool_capacity(config, head_dim),
            value_list=outliers.value_list_capacity(config, num_kv_heads, head_dim),
        )
        for name, (size, dtype) in decode_buffers(shape, launch).items():
            sizes[name] = max(sizes.get(name, 0), prod(size) * dtype.itemsize)
    return sum(sizes.values()) + 4 * batch * num_heads * head_dim
