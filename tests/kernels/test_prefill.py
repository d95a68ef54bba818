"""Prefill by kernels against ``attention.attend`` in f64 over what torch dequantizes.

Pages and exact tokens hold numbers that have nothing to do with each other, so that a query that
reads a page from the wrong one of them, or from both, or not at all, is far off. How far off
roundings may be is derived in ``bounds``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_formats import pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, LayerParameters, ValueParameters
from kvq_kernels import attention, prefill
from kvq_kernels.attention import AttentionOptions, DecodedPages, ExactTokens
from kvq_kernels.dequantize import KeyDequantizer, ValueDequantizer, apply_scales
from kvq_kernels.kernel_tables import KernelTables
from kvq_kernels.phases import COS_SIN_ERROR, Phases
from kvq_kernels.prefill import KernelPages
from kvq_kernels.rotary import RotaryAngles, rotate
from kvq_kernels.workspace import Workspace
from rounding import Stored

U, HALF_U, SUBNORMAL = 2.0**-24, 2.0**-11, 2.0**-25
LARGEST_EXPONENT_ERROR = 2.0**-22
"""Relative, of a device's exp2."""

OPTIONS = AttentionOptions(scaling=0.05)


class PoisonedWorkspace(Workspace):
    """Every buffer is full of NaN, as an integer -1, whenever it is asked for."""

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        taken = super().take(name, shape, dtype, device)
        taken.view(-1).view(torch.uint8).fill_(0xFF)
        return taken


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@dataclass
class Row:
    """A row on the CPU: pages in a pool, exact tokens, and the queries of its last T tokens."""

    config: KVQConfig
    parameters: LayerParameters
    angles: RotaryAngles
    key_pages: KeyPages
    value_pages: ValuePages
    ids: list[int]
    irregular: Tensor
    lengths: list[int]
    query: Tensor
    exact: ExactTokens
    held: int
    recent: int

    @property
    def ends(self) -> Sequence[int]:
        total, ends = self.exact.sinks, []
        for length in self.lengths:
            total += length
            ends.append(total - 1)
        return ends

    @property
    def index(self) -> int:
        return self.exact.start + self.exact.keys.shape[1] - self.exact.sinks - self.query.shape[1]

    def read(self, first: int, last: int) -> DecodedPages:
        """Torch's numbers; an ``attention.RowPages``."""
        ids = self.ids[first:last]
        key, value = _picked(self.key_pages, ids), _picked(self.value_pages, ids)
        keys = KeyDequantizer(self.parameters.key, bits=self.config.key_bits).dequantize(key)
        cos, sin = self.angles.page_cos_sin(key.base_positions)
        for place, base in enumerate(key.base_positions.tolist()):
            if base < 0:
                cos[place], sin[place] = self.angles.cos_sin(self.irregular[-1 - base])
        values = ValueDequantizer(self.parameters.value, bits=self.config.value_bits)
        return DecodedPages(rotate(keys, cos[:, None], sin[:, None]), *values.dequantize(value))

    def expected(self, options: AttentionOptions, *, exact_prefill: bool) -> Tensor:
        sinks = options.sink_logits
        return attention.attend(
            self.query.double(),
            index=self.index,
            pages=self,
            held_pages=self.held,
            exact=self.exact,
            recent_tokens=self.recent,
            options=replace(options, sink_logits=None if sinks is None else sinks.double()),
            exact_prefill=exact_prefill,
        )

    def found(
        self,
        options: AttentionOptions,
        device: torch.device,
        *,
        exact_prefill: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        exact, sinks = self.exact, options.sink_logits
        return prefill.attend(
            _there(self.query, device),
            index=self.index,
            pages=KernelPages(
                key_pages=_moved(self.key_pages, device),
                value_pages=_moved(self.value_pages, device),
                ids=torch.tensor(self.ids, dtype=torch.int64, device=device),
                lengths=self.lengths,
                ends=self.ends,
                tables=KernelTables.of(self.parameters, self.config, device=device),
                phases=Phases.of(self.angles, device=device),
                irregular_positions=self.irregular.to(device),
                workspace=workspace or PoisonedWorkspace(),
            ),
            held_pages=self.held,
            exact=replace(
                exact, keys=_there(exact.keys, device), values=_there(exact.values, device)
            ),
            recent_tokens=self.recent,
            options=replace(options, sink_logits=None if sinks is None else sinks.to(device)),
            exact_prefill=exact_prefill,
        )


def _there(x: Tensor, device: torch.device) -> Tensor:
    # A tensor that is where it shall be keeps its strides.
    return x if x.device == device else x.to(device)


def _moved(packed: Any, device: torch.device) -> Any:
    return type(packed)(*(getattr(packed, f.name).to(device) for f in fields(packed)))


def _picked(packed: Any, ids: list[int]) -> Any:
    def pick(x: Tensor) -> Tensor:
        if x.dtype == torch.uint16:
            return x.view(torch.int16)[ids].view(torch.uint16)
        return x[ids]

    return type(packed)(*(pick(getattr(packed, f.name)) for f in fields(packed)))


def make_row(
    *,
    bits: tuple[int, int] = (4, 3),
    H: int = 1,
    G: int = 1,
    D: int = 16,
    half: int | None = None,
    T: int = 1,
    sinks: int = 1,
    lengths: tuple[int, ...] = (),
    held: int | None = None,
    tail: int | None = None,
    recent: int = 0,
    outliers: bool = False,
    grain: str = "token",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Row:
    """``tail``: tokens behind all pages; None for the T queries."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def codebook(bits: int) -> Codebook:
        return Codebook.fit_grid(torch.linspace(-1, 1.2, 1 << bits).sinh())

    config = KVQConfig(
        key_bits=bits[0],
        value_bits=bits[1],
        value_grain=grain,
        outlier_fraction=0.02 if outliers else 0.0,
        outlier_capacity=0.05,
        qnorm=False,
    )
    parameters = LayerParameters(
        key=KeyParameters(
            center=numbers(H, D) / 8,
            half_range=torch.rand(H, D, generator=generator) + 0.5,
            codebook=codebook(bits[0]),
            outlier_step=0.013,
        ),
        value=ValueParameters(codebook=codebook(bits[1]), outlier_step=0.07),
    )
    half = D // 2 if half is None else half
    n = len(lengths)
    pool = n + 1
    keys = numbers(H, pool * PAGE_TOKENS, D)
    values = numbers(H, pool * PAGE_TOKENS, D)
    # Pages differ by much.
    values += 4 * (torch.arange(pool) % 2 - 0.5).repeat_interleave(PAGE_TOKENS)[:, None]
    key_pages = pages.encode_keys(keys, parameters.key, config, first_position=sinks)
    value_pages = pages.encode_values(values, parameters.value, config)
    ids = torch.randperm(pool, generator=generator)[:n].tolist()
    irregular = torch.randint(0, 2**20, (2, PAGE_TOKENS), generator=generator).int()
    if n > 1:
        key_pages.base_positions[ids[1]] = -2
    for page, length in zip(ids, lengths, strict=True):
        # What is behind the length of a page must count for nothing.
        value_pages.scales[page, :, length:, 1] = 3e4
    held = n if held is None else held
    start = sinks + sum(lengths[:held])
    E = sinks + sum(lengths[held:]) + (T if tail is None else tail)
    return Row(
        config=config,
        parameters=parameters,
        angles=RotaryAngles(10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)),
        key_pages=key_pages,
        value_pages=value_pages,
        ids=ids,
        irregular=irregular,
        lengths=list(lengths),
        query=numbers(H * G, T, D).to(dtype),
        exact=ExactTokens(
            keys=numbers(H, E, D), values=numbers(H, E, D).to(dtype), sinks=sinks, start=start
        ),
        held=held,
        recent=recent,
    )


def bounds(row: Row, options: AttentionOptions, device: torch.device) -> Tensor:
    """How far off outputs may be, f64 ``[T, HQ, 1]``.

    An exact score is off by roundings of f32: of a sum of D products, and of 8 operations around
    it (f64 in the reference), each at most ``u`` of ``sum |q| |k|``. A coded one further

    * by its key, by what ``test_dequantize_pages`` derives: ``2 h`` of the sizes of what its pair
      is made of (entry and centre, and what is stored; ``4 h`` with outliers), and what f32 adds,
      to the reference's f32 numbers, too;
    * by its query, divided by the largest number of its vector and rounded to f16: ``h`` of it, or
      what a subnormal number is rounded by, times the largest.

    Scores off by ``d`` at most move a weight by ``exp(d)`` and their sum by as much the other way,
    so that the mean of values up to V moves by ``(exp(2 d) - 1) V``. A soft cap is nowhere steeper
    than 1; its exponential and quotient are off by ``2**-20`` of the cap.

    Weights are off by exp2, coded ones by ``h``, or the rounding of a subnormal number for each of
    N tokens, as the largest weight is 1. Coded values are off by ``2 h`` of their sizes, with
    outliers ``3 h``. Sums over N tokens, rescaled as often at most, add ``2 N u``.

    On a GPU exact factors are cut to what the matrix instruction takes.
    """
    D = row.query.shape[-1]
    H = row.exact.keys.shape[0]
    query = row.query.double().abs().contiguous()
    size = query.amax(-1, keepdim=True)
    cut = 0.0
    if device.type == "cuda":
        # Two factors, cut to 11 bits, or what three products of such leave out.
        cut = 2 * 2.0**-10 if row.query.dtype != torch.float32 else 4 * 2.0**-21
    grouped = query.reshape(H, -1, D)

    def products(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.mT).amax(-1).view(query.shape[:2])

    exact = row.exact.keys.double().abs()
    off = options.scaling * products(grouped, exact) * ((D + 8) * U + cut)
    largest, value_off = float(row.exact.values.double().abs().max()), 0.0
    if row.ids:
        outliers = row.key_pages.outliers.shape[-1] > 0
        keys, sizes = coded_keys(row)
        key_off = (16 * U + COS_SIN_ERROR + (2 + 2 * outliers) * HALF_U) * sizes + 8 * SUBNORMAL
        query_off = (HALF_U + 2 * U) * query + SUBNORMAL * size
        coded = products(grouped, key_off + (D + 8) * U * keys)
        coded += products(query_off.reshape(H, -1, D), keys + key_off)
        off = torch.maximum(off, options.scaling * coded)
        values, sizes = coded_values(row)
        largest = max(largest, float(values.max()))
        value_off = float(((8 * U + (2 + outliers) * HALF_U) * sizes + 8 * SUBNORMAL).max())
    if options.softcap:
        off = off + options.softcap * 2.0**-20
    N = row.index + row.query.shape[1]
    weight_off = LARGEST_EXPONENT_ERROR + 2 * N * U + cut
    if row.ids:
        weight_off += HALF_U + N * SUBNORMAL
    moved = (torch.expm1(2 * off) + weight_off) * largest + value_off
    return moved.T[..., None]


def coded_keys(row: Row) -> tuple[Tensor, Tensor]:
    """Sizes of rotated keys of the row's pages and of what they are made of, ``[H, N, D]``."""
    key, stored = row.parameters.key, Stored.of(_picked(row.key_pages, row.ids))
    half_range, center = (x.double()[:, None] for x in (key.half_range, key.center))
    sizes = key.codebook.decode_entries[stored.codes].double().abs() * half_range
    sizes += stored.steps.abs() * key.outlier_step * half_range + center.abs()
    half = len(row.angles.frequencies)
    sizes[..., :half] += sizes[..., half : 2 * half]
    sizes[..., half : 2 * half] = sizes[..., :half]
    keys = row.read(0, len(row.ids)).keys.double().abs()
    inside = torch.arange(PAGE_TOKENS) < torch.tensor(row.lengths)[:, None]
    return tuple(x.transpose(1, 2)[inside].transpose(0, 1) for x in (keys, sizes))


def coded_values(row: Row) -> tuple[Tensor, Tensor]:
    """As ``coded_keys``, of values."""
    picked = _picked(row.value_pages, row.ids)
    value, stored = row.parameters.value, Stored.of(picked)
    half_range, center = picked.scales.double().split(1, dim=-1)
    sizes = value.codebook.decode_entries[stored.codes].double().abs() * half_range
    sizes += stored.steps.abs() * value.outlier_step * half_range + center.abs()
    decoded = row.read(0, len(row.ids))
    values = apply_scales(decoded.values, decoded.half_range, decoded.center).double().abs()
    inside = torch.arange(PAGE_TOKENS) < torch.tensor(row.lengths)[:, None]
    return tuple(x.transpose(1, 2)[inside].transpose(0, 1) for x in (values, sizes))


def assert_close(
    row: Row,
    device: torch.device,
    options: AttentionOptions = OPTIONS,
    *,
    exact_prefill: bool = False,
) -> None:
    found = row.found(options, device, exact_prefill=exact_prefill)
    expected = row.expected(options, exact_prefill=exact_prefill)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert found.isfinite().all()
    excess = (found.cpu().double() - expected).abs() / bounds(row, options, device)
    assert excess.max() <= 1, f"{excess.max():.3f} of the bound"


@pytest.mark.parametrize("bits", [(2, 4), (3, 2), (4, 3)])
@pytest.mark.parametrize("outliers", [False, True])
def test_widths(bits: tuple[int, int], outliers: bool, device: torch.device) -> None:
    row = make_row(
        bits=bits, outliers=outliers, H=2, G=2, T=5, lengths=(256, 256), tail=30, grain="head"
    )
    assert_close(row, device)


@pytest.mark.parametrize(("D", "half"), [(64, 32), (80, 10), (128, 64)])
def test_head_dims(D: int, half: int, device: torch.device) -> None:
    assert_close(make_row(D=D, half=half, G=3, T=9, lengths=(256,)), device)


@pytest.mark.parametrize(
    ("G", "dtype"),
    [(1, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16), (7, torch.float32)],
)
def test_group_sizes(G: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_close(make_row(H=2, G=G, T=65, lengths=(256,), dtype=dtype), device)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("lengths", [(), (256, 256)])
def test_numbers_of_queries(T: int, lengths: tuple[int, ...], device: torch.device) -> None:
    """Without pages nothing is rounded to f16: a token that is seen too early is found."""
    assert_close(make_row(G=2, T=T, lengths=lengths), device)
    assert_close(make_row(T=T, lengths=lengths, tail=T + 100, recent=50), device)


@pytest.mark.parametrize("recent", [0, 1, 100, 300])
def test_each_query_of_a_chunk_sees_by_its_own_limit(recent: int, device: torch.device) -> None:
    # 700 new tokens that completed two pages beside the one that was held.
    row = make_row(lengths=(256, 256, 256), held=1, tail=228, T=700, recent=recent)
    assert_close(row, device)
    # Of a page that was complete before, but recent, the exact numbers are there.
    assert_close(make_row(lengths=(256, 256), held=0, tail=90, T=80, recent=recent), device)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_first_query_that_reads_a_page_from_codes(ahead: int, device: torch.device) -> None:
    """Of two queries none, the second or both: the page ends before their index less 3."""
    assert_close(make_row(lengths=(256,), held=0, T=2, tail=3 + ahead, recent=3), device)


@pytest.mark.parametrize("held", [0, 1])
def test_exact_prefill_reads_the_chunk_exactly(held: int, device: torch.device) -> None:
    row = make_row(lengths=(256, 256), held=held, tail=20, T=270, recent=7)
    assert_close(row, device, exact_prefill=True)
    by_rule, exactly = (row.found(OPTIONS, device, exact_prefill=e) for e in (False, True))
    assert (by_rule - exactly).abs().max() > 0.1


def test_pages_that_were_cut(device: torch.device) -> None:
    assert_close(make_row(lengths=(256, 17, 256, 1), T=70), device)
    # Beside pages that these tokens completed, and within the recent tokens.
    row = make_row(lengths=(30, 256), held=1, T=200, tail=100, recent=64)
    assert_close(row, device)


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("T", [1, 3])
def test_nothing_but_new_tokens(sinks: int, T: int, device: torch.device) -> None:
    assert_close(make_row(sinks=sinks, T=T), device)


def test_queries_among_the_sinks(device: torch.device) -> None:
    assert_close(make_row(sinks=6, tail=0, T=4), device)
    assert_close(make_row(sinks=6, tail=3, T=7), device)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_learned_sinks(
    softcap: float | None, with_sinks: bool, device: torch.device
) -> None:
    row = make_row(H=2, G=2, T=40, lengths=(256,))
    logits = torch.tensor([-3.0, 2.0, 6.0, 40.0]) if with_sinks else None
    options = AttentionOptions(scaling=0.05, softcap=softcap, sink_logits=logits)
    assert_close(row, device, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    row = make_row(H=2, G=2, T=20, lengths=(256,), dtype=dtype)
    # As a projection gives them: [T, heads, D].
    row.query = row.query.transpose(0, 1).contiguous().transpose(0, 1)
    values = row.exact.values.transpose(0, 1).contiguous().transpose(0, 1)
    row.exact = replace(row.exact, values=values)
    assert_close(row, device)


def test_channels_that_are_not_side_by_side(device: torch.device) -> None:
    row = make_row(G=2, T=20)
    row.query = row.query.mT.contiguous().mT
    assert_close(row, device)


def test_queries_beyond_the_range_of_f16(device: torch.device) -> None:
    row = make_row(T=3, lengths=(256,))
    row.query *= torch.tensor([1e6, 0.0, 1e-9])[:, None]
    assert_close(row, device, AttentionOptions(scaling=0.5e-7))
    assert_close(row, device, AttentionOptions(scaling=0.0))


def test_scores_far_apart_stay_finite(device: torch.device) -> None:
    """Blocks whose scores differ by thousands neither overflow nor lose the larger one."""
    row = make_row(T=3, lengths=(256,))
    row.exact.keys.mul_(1e4)
    assert_close(row, device)


def test_blocks_of_one_page_give_the_same(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = make_row(lengths=(256, 100, 256), held=2, T=300, tail=70)
    whole = row.found(OPTIONS, device)
    monkeypatch.setattr(prefill, "BLOCK_BYTES", 1)
    assert_close(row, device)
    # Weights are rounded relative to the largest score so far, which blocks do not change.
    N = row.index + row.query.shape[1]
    values = coded_values(row)[0].max()
    assert (row.found(OPTIONS, device) - whole).abs().max() <= 2 * N * U * values


def test_nothing_larger_than_a_block_is_held(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    H, G, D, T = 1, 2, 16, 40
    monkeypatch.setattr(prefill, "BLOCK_BYTES", 2 * 2 * 2 * H * PAGE_TOKENS * D)
    for lengths, held in [((256,) * 3, 3), ((256,) * 3, 2), ((256,), 1), ((), 0)]:
        row = make_row(H=H, G=G, D=D, T=T, lengths=lengths, held=held)
        workspace = PoisonedWorkspace()
        output = row.found(OPTIONS, device, workspace=workspace)
        held_bytes = output.nbytes + workspace.nbytes
        blocks = min(len(lengths), 2)
        counted = prefill.scratch_bytes(
            num_heads=H * G,
            num_kv_heads=H,
            head_dim=D,
            tokens=T,
            coded_pages=len(lengths),
            exact_tokens=row.exact.keys.shape[1],
        )
        # A block of pages that all queries see whole needs no say who sees what; the sink has its
        # launch for itself.
        assert held_bytes <= counted <= held_bytes + 8 * (1 + (PAGE_TOKENS + 1) * blocks)


@pytest.mark.parametrize("amd", [False, True])
def test_tiles_are_powers_of_two_that_pages_are_cut_into(amd: bool) -> None:
    for d_tile in (16, 64, 128, 256):
        for precision in ("half", "tf32", "tf32x3", "ieee"):
            cut = prefill.tiles(d_tile, precision, amd=amd)
            assert PAGE_TOKENS % cut["TOKEN_TILE"] == 0
            assert cut["ROW_TILE"] & (cut["ROW_TILE"] - 1) == 0
