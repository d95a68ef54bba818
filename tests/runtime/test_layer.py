"""A packed layer against a plain list of tokens, through all operations of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exact_pages import ExactPageCodec
from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import CacheFullError, KVQError
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.packed_rows import table_entry
from kvq_kernels.rotary import RotaryAngles
from kvq_runtime.forward import Forward, spans
from kvq_runtime.layer import PackedLayer

EPS = torch.finfo(torch.float32).eps
H, G, D = 2, 2, 8
OPTIONS = AttentionOptions(scaling=0.35)


@dataclass
class Rotary:
    """Six of eight channels are rotated."""

    order: Tensor = field(default_factory=lambda: torch.arange(D))
    rotary_dim: int = 6

    def angles(self) -> RotaryAngles:
        return RotaryAngles(torch.tensor([1.0, 0.1, 0.003], dtype=torch.float64))


def make_layer(
    *, sinks: int = 1, recent: int = 0, capacity: int | None = None, **options: Any
) -> PackedLayer:
    rotary: Any = Rotary()
    codec = ExactPageCodec(rotary, H, D, sink_tokens=sinks, recent_tokens=recent, **options)
    return PackedLayer(codec, capacity=capacity)


def numbers(B: int, T: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, H, T, D, generator=generator) for _ in range(2))
    return keys, values


def forward_of(attended: Tensor, positions: Tensor) -> Forward:
    full = [bool(row.all()) for row in attended]
    return Forward(
        attended=[
            None if whole else row.nonzero()[:, 0]
            for whole, row in zip(full, attended, strict=True)
        ],
        runs=[spans(row) for row in attended],
        positions=positions.to(torch.int32),
    )


@dataclass
class PlainRow:
    """All tokens of a row, in order: slots and positions ``[N]``, keys and values ``[H, N, D]``."""

    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    keys: Tensor = field(default_factory=lambda: torch.zeros(H, 0, D))
    values: Tensor = field(default_factory=lambda: torch.zeros(H, 0, D))

    def __len__(self) -> int:
        return len(self.slots)

    def kept(self, slots: int) -> PlainRow:
        n = int((self.slots < slots).sum())
        return PlainRow(self.slots[:n], self.positions[:n], self.keys[:, :n], self.values[:, :n])


class Plain:
    """A batch of plain rows."""

    def __init__(self, B: int) -> None:
        self.rows = [PlainRow() for _ in range(B)]
        self.slots = 0

    def append(self, keys: Tensor, values: Tensor, attended: Tensor, positions: Tensor) -> None:
        T = keys.shape[2]
        for b, row in enumerate(self.rows):
            kept = attended[b]
            new = torch.arange(self.slots, self.slots + T)[kept]
            self.rows[b] = PlainRow(
                torch.cat([row.slots, new]),
                torch.cat([row.positions, positions[b][kept].long()]),
                torch.cat([row.keys, keys[b][:, kept]], 1),
                torch.cat([row.values, values[b][:, kept]], 1),
            )
        self.slots += T

    def crop(self, kept: int) -> None:
        self.slots = min(self.slots, kept)
        self.rows = [row.kept(kept) for row in self.rows]

    def select(self, *indices: int) -> None:
        self.rows = [self.rows[index] for index in indices]

    def attention(self, query: Tensor, attended: Tensor) -> Tensor:
        """f64 ``[B, T, HQ, D]`` of the last T slots; padding gives 0."""
        B, HQ, T, _ = query.shape
        output = torch.zeros(B, T, HQ, D, dtype=torch.float64)
        for b, row in enumerate(self.rows):
            keys = rotated(row.keys, row.positions.double()).repeat_interleave(HQ // H, 0)
            values = row.values.repeat_interleave(HQ // H, 0).double()
            scores = query[b].double() @ keys.mT * OPTIONS.scaling
            seen = row.slots <= torch.arange(self.slots - T, self.slots)[:, None]
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            result = (weights @ values).transpose(0, 1)
            output[b, attended[b]] = result[attended[b]]
        return output


def rotated(keys: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None] * Rotary().angles().frequencies
    cos, sin = angles.cos(), angles.sin()
    x1, x2, rest = keys.double().split([3, 3, 2], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def feed(
    layer: PackedLayer,
    plain: Plain,
    *,
    T: int,
    seed: int,
    attended: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """One forward through both; what attention gives must agree."""
    B = len(plain.rows)
    keys, values = numbers(B, T, seed)
    query = torch.randn(B, H * G, T, D, generator=torch.Generator().manual_seed(seed + 1000))
    if attended is None:
        attended = torch.ones(B, T, dtype=torch.bool)
    if positions is None:
        positions = torch.arange(plain.slots, plain.slots + T).expand(B, T)
    layer.append(keys, values, forward=forward_of(attended, positions))
    plain.append(keys, values, attended, positions)
    found = layer.attend(query, OPTIONS, rule="runtime")
    expected = plain.attention(query, attended)
    N = max((len(row) for row in plain.rows), default=0) + 1
    # A score sums D products whose angles are off by at most 4 * 2**-24, and moves its weight by
    # that factor twice; a weighted sum of N values adds N eps. Normal draws here stay below 6.
    size = D * 6 * 6 * OPTIONS.scaling
    bound = EPS * (2 * (D + 4) * size + N) * 6
    assert ((found - expected).abs() <= bound).all()
    assert layer.get_seq_length() == plain.slots
    assert [row.tokens for row in layer.rows] == [len(row) for row in plain.rows]


@pytest.mark.parametrize("recent", [0, 3, 300])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("chunks", [(1,) * 5, (256,), (257, 1), (258,), (1000, 1, 600, 3)])
def test_chunks_of_any_size(recent: int, sinks: int, chunks: tuple[int, ...]) -> None:
    layer, plain = make_layer(recent=recent, sinks=sinks), Plain(2)
    for seed, T in enumerate(chunks):
        feed(layer, plain, T=T, seed=seed)
        assert layer.rows[0].tail <= recent + PAGE_TOKENS
        paged = sum(chunks[: seed + 1]) - sinks - recent - 1
        assert len(layer.rows[0].pages) == max(0, paged // PAGE_TOKENS)


def test_token_by_token_packs_what_one_chunk_packs() -> None:
    keys, values = numbers(1, 900, 0)
    whole, single = make_layer(recent=5), make_layer(recent=5)
    whole.append(keys, values)
    for t in range(900):
        single.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    assert whole.rows == single.rows
    assert torch.equal(whole.block_table[:, :3], single.block_table[:, :3])
    one, other = (layer.exact.read(0, 0, 1 + layer.rows[0].tail) for layer in (whole, single))
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    (one_key, one_value), (key, value) = (
        next(layer.pool.read(layer.rows[0].pages)) for layer in (whole, single)
    )
    assert torch.equal(one_key.numbers, key.numbers)
    assert torch.equal(one_key.base_positions, key.base_positions)
    assert torch.equal(one_value.numbers, value.numbers)


def test_padding_is_not_stored_and_a_rows_pages_do_not_depend_on_its_batch() -> None:
    keys, values = numbers(1, 600, 0)
    alone = make_layer()
    alone.append(keys, values)
    padded = make_layer()
    attended = torch.ones(2, 640, dtype=torch.bool)
    attended[0, :40] = False
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    other_keys, other_values = numbers(2, 640, 1)
    other_keys[0, :, 40:], other_values[0, :, 40:] = keys[0], values[0]
    padded.append(other_keys, other_values, forward=forward_of(attended, positions))
    assert [row.tokens for row in padded.rows] == [600, 640]
    assert padded.get_mask_sizes(3) == (643, 0)
    ((found, _),) = padded.pool.read(padded.rows[0].pages)
    ((expected, _),) = alone.pool.read(alone.rows[0].pages)
    assert torch.equal(found.numbers, expected.numbers)
    assert torch.equal(found.base_positions, expected.base_positions)


def test_several_turns_with_padding_in_the_middle() -> None:
    layer, plain = make_layer(sinks=2), Plain(3)
    first = torch.ones(3, 300, dtype=torch.bool)
    first[1, :290] = False
    first[2] = False
    feed(layer, plain, T=300, seed=0, attended=first)
    second = torch.ones(3, 20, dtype=torch.bool)
    second[0, 15:] = False
    feed(layer, plain, T=20, seed=1, attended=second)
    feed(layer, plain, T=1, seed=2)
    third = torch.tensor([[True], [False], [True]])
    feed(layer, plain, T=1, seed=3, attended=third)
    feed(layer, plain, T=400, seed=4)


def test_positions_that_jump() -> None:
    layer, plain = make_layer(), Plain(1)
    positions = torch.arange(700)
    positions[100:] += 5000
    positions[612:] += 100_000
    feed(layer, plain, T=700, seed=0, positions=positions[None])
    assert sorted(layer.pool.irregular) == [0]
    feed(layer, plain, T=300, seed=1, positions=torch.arange(900_000, 900_300)[None])
    # The third page holds the jump at 612 and the one between the two turns.
    assert sorted(layer.pool.irregular) == [0, 2]


@pytest.mark.parametrize("recent", [0, 40])
@pytest.mark.parametrize("removed", [1, 20, 200, 256, 300, 700, 999, 1000, 5000])
def test_crop_then_go_on(recent: int, removed: int) -> None:
    layer, plain = make_layer(recent=recent), Plain(2)
    feed(layer, plain, T=1000, seed=0)
    layer.crop(-removed)
    plain.crop(max(0, 1000 - removed))
    assert layer.get_seq_length() == max(0, 1000 - removed)
    for seed, T in enumerate((1, 1, 3, 600, 1)):
        feed(layer, plain, T=T, seed=10 + seed)
    assert layer.pool.used_pages == len({page for row in layer.rows for page in row.pages})


def test_crop_to_a_length_and_no_crop() -> None:
    layer, plain = make_layer(), Plain(1)
    feed(layer, plain, T=700, seed=0)
    layer.crop(0)
    layer.crop(700)
    layer.crop(9000)
    assert layer.get_seq_length() == 700
    layer.crop(300)
    plain.crop(300)
    # The second page is cut to 300 - 1 - 256 tokens, and its entry says so.
    assert layer.rows[0].lengths == [256, 43]
    assert layer.block_table[0, :2].tolist() == [0, table_entry(1, 43)]
    feed(layer, plain, T=5, seed=1)


def test_cut_pages_are_never_encoded_again() -> None:
    layer, plain = make_layer(), Plain(1)
    feed(layer, plain, T=600, seed=0)
    encoded = len(layer.codec.encoded)
    layer.crop(-200)
    plain.crop(400)
    feed(layer, plain, T=20, seed=1)
    assert len(layer.codec.encoded) == encoded


def test_rows_are_reordered_repeated_and_selected_without_copying_pages() -> None:
    layer, plain = make_layer(), Plain(3)
    feed(layer, plain, T=600, seed=0)
    allocated = layer.pool.allocated_bytes
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    plain.select(2, 0, 0)
    assert layer.pool.used_pages == 4
    feed(layer, plain, T=300, seed=1)
    layer.batch_repeat_interleave(2)
    plain.select(0, 0, 1, 1, 2, 2)
    feed(layer, plain, T=1, seed=2)
    layer.batch_select_indices(torch.tensor([1, 5]))
    plain.select(1, 5)
    feed(layer, plain, T=2, seed=3)
    layer.batch_select_indices(torch.tensor([False, True]))
    plain.select(1)
    feed(layer, plain, T=1, seed=4)
    assert layer.pool.used_pages == len(layer.rows[0].pages)
    assert layer.pool.allocated_bytes == allocated


def test_a_row_that_is_cut_leaves_its_twin_whole() -> None:
    layer, plain = make_layer(), Plain(1)
    feed(layer, plain, T=600, seed=0)
    layer.batch_repeat_interleave(2)
    plain.select(0, 0)
    layer.crop(-300)
    plain.crop(300)
    feed(layer, plain, T=500, seed=1)


def test_reset_keeps_slabs_and_forgets_tokens() -> None:
    layer, plain = make_layer(), Plain(2)
    feed(layer, plain, T=600, seed=0)
    allocated = layer.allocated_bytes
    layer.reset()
    assert (layer.get_seq_length(), layer.pool.used_pages) == (0, 0)
    assert layer.held_bytes < layer.allocated_bytes == allocated
    plain = Plain(2)
    feed(layer, plain, T=600, seed=1)
    assert layer.allocated_bytes == allocated


def test_operations_on_an_empty_layer_do_nothing() -> None:
    layer = make_layer()
    layer.reset()
    layer.crop(-5)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0]))
    assert (layer.get_seq_length(), layer.get_max_length()) == (0, -1)
    assert layer.get_mask_sizes(7) == (7, 0)
    assert layer.allocated_bytes == layer.held_bytes == 0


def test_no_tokens_at_all() -> None:
    layer, plain = make_layer(), Plain(2)
    feed(layer, plain, T=0, seed=0)
    feed(layer, plain, T=3, seed=1, attended=torch.zeros(2, 3, dtype=torch.bool))
    feed(layer, plain, T=3, seed=2)


@pytest.mark.parametrize("capacity", [1, 256, 257, 258, 1000])
@pytest.mark.parametrize("recent", [0, 10])
def test_a_capacity_is_allocated_once_and_suffices(capacity: int, recent: int) -> None:
    layer = make_layer(capacity=capacity, recent=recent)
    keys, values = numbers(2, capacity, 0)
    layer.append(keys[:, :, :1], values[:, :, :1])
    allocated, table = layer.allocated_bytes, layer.block_table.data_ptr()
    layer.append(keys[:, :, 1:], values[:, :, 1:])
    assert layer.allocated_bytes == allocated
    assert layer.block_table.data_ptr() == table
    assert layer.held_bytes == allocated
    assert layer.get_max_length() == capacity
    with pytest.raises(CacheFullError, match=f"room for {capacity:,} tokens"):
        layer.append(keys[:, :, :1], values[:, :, :1])
    assert layer.get_seq_length() == capacity


def test_bytes_are_those_of_the_tensors() -> None:
    layer = make_layer(capacity=1000, recent=3)
    layer.allocate(2, dtype=torch.float16, device="meta")
    exact = 2 * 2 * H * (1 + 3 + 256) * D * 2 + 4 * 2 * 260
    pages = 2 * 3 * layer.pool.page_bytes + 4 * 2 * 3
    assert layer.allocated_bytes == exact + pages


def test_another_batch_is_refused() -> None:
    layer = make_layer()
    layer.append(*numbers(2, 3, 0))
    with pytest.raises(KVQError, match="holds 2 rows and got 3"):
        layer.append(*numbers(3, 3, 0))


def test_use_outside_of_attach_and_offloading_are_refused() -> None:
    layer = make_layer()
    with pytest.raises(KVQError, match="outside of"):
        layer.update(*numbers(1, 3, 0))
    with pytest.raises(KVQError, match="cannot be offloaded"):
        layer.offload()


STEPS = st.one_of(
    st.tuples(st.just("feed"), st.sampled_from([1, 1, 2, 100, 255, 256, 257, 520])),
    st.tuples(st.just("crop"), st.integers(1, 600)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("reset"), st.just(0)),
)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(STEPS, max_size=8), recent=st.sampled_from([0, 1, 70]), seed=st.integers(0, 9)
)
def test_any_sequence_of_operations(steps: list[tuple[str, int]], recent: int, seed: int) -> None:
    layer, plain = make_layer(recent=recent), Plain(2)
    generator = torch.Generator().manual_seed(seed)
    for place, (what, size) in enumerate(steps):
        B = len(plain.rows)
        if what == "feed":
            attended = torch.rand(B, size, generator=generator) > 0.2
            attended |= torch.rand(B, 1, generator=generator) > 0.5
            feed(layer, plain, T=size, seed=place, attended=attended)
        elif what == "crop":
            layer.crop(-size)
            plain.crop(max(0, plain.slots - size))
        elif what == "reset":
            layer.reset()
            plain = Plain(B)
        elif layer.is_initialized and what == "reorder":
            order = torch.randint(0, B, (B,), generator=generator)
            layer.reorder_cache(order)
            plain.select(*order.tolist())
        elif layer.is_initialized and B < 5:
            layer.batch_repeat_interleave(size)
            plain.select(*[row for row in range(B) for _ in range(size)])
    if layer.is_initialized:
        assert layer.pool.used_pages == len({page for row in layer.rows for page in row.pages})
