"""Side passes for outliers in Gluon, compiled: on a GPU, or by a machine that runs PTX.

They are held to f64 sums over dense residuals. Numbers of the exact cases are such that f16 and f32
hold all products and sums: there, not a bit may differ. The other cases allow for f16 products.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.outliers import TOKEN_BITS, channel_bits, residual_limits

pytestmark = pytest.mark.skipif(
    os.environ.get("KVQ_TEST_DEVICE", "cpu") == "cpu",
    reason="Gluon cannot be interpreted: test_compiled.py runs this file",
)

WARPS = 2
STEP = 1 / 64
H = 2
NAN = float("nan")


@dataclass
class Entries:
    """Entries of pages, sorted by group (token of a key, channel of a value).

    ``packed`` i16 ``[P, H, capacity]``, ``counts`` i64 ``[P, H, groups]`` and ``dense`` f64
    ``[P, H, groups, members]``, in steps.
    """

    packed: Tensor
    counts: Tensor
    dense: Tensor


def entries(
    fills: list[str], *, capacity: int, groups: int, members: int, bits: int, seed: int
) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    low, high = residual_limits(bits)
    packed = torch.zeros(len(fills), H, capacity, dtype=torch.int32)
    counts = torch.zeros(len(fills), H, groups, dtype=torch.int64)
    dense = torch.zeros(len(fills), H, groups * members, dtype=torch.float64)
    for page, fill in enumerate(fills):
        for head in range(H):
            count = {
                "empty": 0,
                "full": capacity,
                "one": 1,
                "part": int(torch.randint(capacity, (1,), generator=generator)),
            }.get(fill, min(capacity, members))
            if fill in ("first", "middle", "last"):  # all in one group
                group = {"first": 0, "middle": groups // 3, "last": groups - 1}[fill]
                places = torch.arange(count) + group * members
            else:
                places = torch.randperm(groups * members, generator=generator)[:count]
                places = places.sort().values
            steps = torch.randint(low, high + 1, (count,), generator=generator)
            packed[page, head, :count] = (steps << bits) | (places % members)
            counts[page, head] = torch.bincount(places // members, minlength=groups)
            dense[page, head, places] = steps.double()
    return Entries(packed.to(torch.int16), counts, dense.unflatten(-1, (groups, members)))


ALL = ["part", "full", "empty", "first", "one", "last", "middle", "part"]


def rows_of(lengths: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pages i64 ``[B, W]``, block table of these, some cut, and lengths."""
    width = max(*lengths, 1) + 1
    pages = torch.randint(len(ALL), (len(lengths), width), generator=generator)
    cut = torch.randint(3, pages.shape, generator=generator)
    table = (pages | (cut << 23)).int()
    return pages, table, torch.tensor([[n, 1, 2] for n in lengths], dtype=torch.int32)


def numbers(shape: tuple[int, ...], generator: torch.Generator, *, exact: bool) -> Tensor:
    """Multiples of a quarter from -1 to 1, or any."""
    if exact:
        return torch.randint(-4, 5, shape, generator=generator) / 4
    return torch.rand(shape, generator=generator) * 2 - 1


def sizes_of(shape: tuple[int, ...], generator: torch.Generator, *, exact: bool) -> Tensor:
    """Powers of two, or any."""
    if exact:
        return 2.0 ** torch.randint(-1, 2, shape, generator=generator)
    return torch.rand(shape, generator=generator) + 0.5


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    on_device = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    kernel[grid](**on_device)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value.copy_(on_device[name])


def check_keys(
    device: torch.device,
    *,
    G: int = 4,
    D: int = 128,
    capacity: int = 328,
    lengths: tuple[int, ...] = (5, 0, 3),
    programs: int = 2,
    exact: bool = True,
) -> None:
    from kvq_kernels.nvidia.entry_counts import slots
    from kvq_kernels.nvidia.key_outliers import key_outlier_scores

    generator = torch.Generator().manual_seed(G + capacity)
    bits, half, width = channel_bits(D), D // 2, triton.next_power_of_2(G)
    pool = entries(ALL, capacity=capacity, groups=PAGE_TOKENS, members=D, bits=bits, seed=capacity)
    pages, table, row_lengths = rows_of(lengths, generator)
    B, W = table.shape
    half_range = sizes_of((H, D), generator, exact=exact)
    turned = numbers((B, H, W, D, width), generator, exact=exact).half()
    turned[..., G:] = 0
    sizes = sizes_of((B, H, width), generator, exact=exact)
    if exact:
        turns = torch.randint(4, (PAGE_TOKENS, half), generator=generator)
        cos, sin = ((turns + 1) % 2 * (1 - turns)).half(), (turns % 2 * (2 - turns)).half()
    else:
        angle = torch.rand(PAGE_TOKENS, half, generator=generator) * 7
        cos, sin = angle.cos().half(), angle.sin().half()
    weights = torch.full((B, H, W * PAGE_TOKENS, G), NAN, dtype=torch.float16)
    scale = 0.125
    tiled, room = max(4, width), slots(capacity)
    launch(
        key_outlier_scores,
        (programs, H, B),
        device,
        turned=turned,
        sizes=sizes,
        pools=pool.packed,
        counts=pool.counts.to(torch.uint8),
        half_range=half_range,
        block_table=table,
        lengths=row_lengths,
        offset_turns=torch.stack([cos, sin], -1),
        weights=weights,
        key_sums=torch.full((B, H, programs, room, tiled), NAN),
        key_marks=torch.full((B, H, programs, room - 1), 2**20, dtype=torch.int32),
        key_queries=torch.full((B, H, programs, tiled // 4, D, 2, 4), NAN, dtype=torch.float16),
        table_width=W,
        max_pages=W,
        weight_tokens=W * PAGE_TOKENS,
        score_scale=scale,
        residual_step=STEP,
        H=H,
        G=G,
        GROUP_WIDTH=width,
        D=D,
        HALF=half,
        CAPACITY=capacity,
        CHANNEL_BITS=bits,
        num_warps=1,
    )
    keys = pool.dense * half_range[None, :, None].double() * STEP
    first, second = keys.split(half, -1)
    c, s = cos.double(), sin.double()
    keys = torch.cat([first * c - second * s, second * c + first * s], -1)
    queries = turned[..., :G].double() * sizes[:, :, None, None, :G].double() * scale
    wanted = torch.einsum("bwhtd,bhwdg->bhwtg", keys[pages], queries)
    # What one entry can be wrong by, and how many there are: roundings of f16 are independent.
    spread = torch.einsum("bwhtd,bhwdg->bhwtg", keys[pages] ** 2, queries**2).sqrt()
    found = weights.unflatten(2, (W, PAGE_TOKENS))
    for row, length in enumerate(lengths):
        assert found[row, :, length:].isnan().all()
        error = found[row, :, :length].double() - wanted[row, :, :length]
        if exact:
            rounded = wanted[row, :, :length].half()
            assert torch.equal(found[row, :, :length], rounded)
        else:
            limit = 2.0**-11 * (4 * spread + wanted.abs())[row, :, :length] + 1e-5
            assert (error.abs() <= limit).all(), (error.abs() / limit).max()


def check_values(
    device: torch.device,
    *,
    G: int = 4,
    D: int = 128,
    capacity: int = 400,
    lengths: tuple[int, ...] = (11, 0, 6),
    splits: int = 2,
    exact: bool = True,
) -> None:
    from kvq_kernels.nvidia.entry_counts import slots
    from kvq_kernels.nvidia.value_outliers import value_outlier_sums

    generator = torch.Generator().manual_seed(G + capacity)
    fills = [fill if fill != "full" or capacity <= D * PAGE_TOKENS else "part" for fill in ALL]
    listed = entries(
        fills, capacity=capacity, groups=D, members=PAGE_TOKENS, bits=TOKEN_BITS, seed=capacity
    )
    pages, table, row_lengths = rows_of(lengths, generator)
    B, W = table.shape
    offsets = torch.zeros(len(ALL), H, D + 1, dtype=torch.int64)
    offsets[..., 1:] = listed.counts.cumsum(-1)
    weights = numbers((B, H, W * PAGE_TOKENS, G), generator, exact=exact).abs().half()
    exact_splits = 1
    shape = (B, H, exact_splits + splits, G)
    page_max = torch.randint(-3, 1, (B, H, W, G), generator=generator).float()
    split_max = torch.randint(0, 2, shape, generator=generator).float()
    if not exact:
        page_max -= torch.rand(page_max.shape, generator=generator)
    page_range = sizes_of((B, H, W), generator, exact=exact)
    split_out = numbers((*shape, D), generator, exact=exact)
    before = split_out.double()
    tiled = max(4, triton.next_power_of_2(G))
    launch(
        value_outlier_sums,
        (splits, H, B),
        device,
        lists=listed.packed,
        offsets=offsets.to(torch.uint16),
        block_table=table,
        lengths=row_lengths,
        weights=weights,
        page_max=page_max,
        page_range=page_range,
        split_out=split_out,
        split_max=split_max,
        value_sums=torch.full((B, H, splits, WARPS, slots(capacity, D), tiled), NAN),
        table_width=W,
        max_pages=W,
        weight_tokens=W * PAGE_TOKENS,
        residual_step=STEP,
        H=H,
        G=G,
        GROUP_WIDTH=triton.next_power_of_2(G),
        D=D,
        CAPACITY=capacity,
        EXACT_SPLITS=exact_splits,
        num_warps=WARPS,
    )
    residuals = listed.dense * STEP
    by_page = weights.double().unflatten(2, (W, PAGE_TOKENS))
    wanted, spread = before.clone(), torch.zeros_like(before)
    for row, length in enumerate(lengths):
        each = -(-length // splits)
        for index in range(length):
            split = exact_splits + index // each
            factor = torch.exp2(page_max[row, :, index] - split_max[row, :, split]).double()
            factor *= page_range[row, :, index, None]
            dense, weight = residuals[pages[row, index]], by_page[row, :, index]
            added = torch.einsum("hdt,htg->hgd", dense, weight) * factor[..., None]
            wanted[row, :, split] += added
            squares = torch.einsum("hdt,htg->hgd", dense**2, weight**2) * factor[..., None] ** 2
            spread[row, :, split] += squares
    error = split_out.double() - wanted
    if exact:
        assert torch.equal(split_out, wanted.float())
    else:
        limit = 2.0**-11 * 2 * spread.sqrt() + 1e-4
        assert (error.abs() <= limit).all(), (error.abs() / limit).max()
    assert torch.equal(split_out[:, :, :exact_splits].double(), before[:, :, :exact_splits])


@pytest.mark.parametrize("G", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("D", [64, 128])
def test_groups(G: int, D: int, device: torch.device) -> None:
    check_keys(device, G=G, D=D, capacity=D * 328 // 128)
    check_values(device, G=G, D=D, capacity=200 if D == 64 else 400)


# One entry a lane and fewer; an even number; as many as registers hold; two and three times that.
@pytest.mark.parametrize("capacity", [8, 24, 64, 384, 512, 520, 1304])
def test_capacities(capacity: int, device: torch.device) -> None:
    check_keys(device, capacity=capacity)
    check_values(device, capacity=capacity)


@pytest.mark.parametrize("shares", [1, 3, 16])
def test_shares(shares: int, device: torch.device) -> None:
    check_keys(device, programs=shares)
    check_values(device, splits=shares)


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 1, 4, 5), (9, 2)])
def test_lengths(lengths: tuple[int, ...], device: torch.device) -> None:
    check_keys(device, lengths=lengths)
    check_values(device, lengths=lengths)


@pytest.mark.parametrize("G", [1, 4, 6])
def test_roundings(G: int, device: torch.device) -> None:
    check_keys(device, G=G, exact=False)
    check_values(device, G=G, exact=False)
