"""Complete pages quantized and packed on the device by Triton kernels.

Gives the bytes that ``kvq_formats.pages.encode_keys`` and ``encode_values`` give, without waiting
for the device. Keys take three launches and values four, because no thread reads what another wrote
in the same launch: scales of values (``value_scales``), targets of error feedback
(``shape_kernel``), codes and outlier candidates (``pack_codes``), pools (``select_outliers``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from kvq_formats import outliers
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.errors import ConfigError
from kvq_formats.feedback import Feedback
from kvq_formats.pages import KeyPages, ValuePages, allocated_bytes
from kvq_formats.parameters import KeyParameters, ValueParameters
from kvq_kernels.launch import current
from kvq_kernels.pack_codes import pack_key_codes, pack_value_codes
from kvq_kernels.select_outliers import CHUNK, select_outliers
from kvq_kernels.shape_kernel import SHAPE_TOKENS, SHAPE_WARPS, gain_panels, shape_errors
from kvq_kernels.value_scales import value_scales

SCRATCH_BYTES = 64 * 2**20
"""What outlier candidates may take: longer texts are packed in blocks of pages."""

CANDIDATE_BYTES = 6
"""A magnitude f32 and an entry i16, for every number."""

TARGET_BYTES = 4
"""A target f32 of error feedback, for every number."""

ERROR_BYTES = 4
"""An error f32 of every number: it lies where its magnitude comes later, if there are outliers."""

CHANNELS = 32
"""Channels that a program packs: with 16 rows 4 numbers a thread, which fit its registers with all
that belongs to them, and pages of few heads still spread over several programs."""

SCALE_TILE = 1024
"""Numbers whose range a warp looks for, 32 a thread: whole tokens, one if it is long."""

CODE_WARPS = 4
SELECT_WARPS = 8
"""A program reads a page and head several times over: it needs many loads in flight."""

SCALE_WARPS = 8
"""At most; a token of up to ``SCALE_TILE`` numbers takes one, which then waits for no other."""

LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Lowest bit that can be set in an f32 of a number of each dtype that kernels read."""

Pages = TypeVar("Pages", KeyPages, ValuePages)


class PackTables:
    """A codebook on the device, and what error feedback needs."""

    def __init__(
        self,
        codebook: Codebook,
        feedback: Feedback | None,
        *,
        bits: int,
        device: torch.device | str,
    ) -> None:
        if bits != codebook.bits:
            raise ConfigError(
                f"codes of {bits} bits cannot be chosen with a codebook of {codebook.bits} bits.",
                hint=f"calibrate the model again: kvq calibrate MODEL --bits {bits}",
            )
        self.bits = bits
        self.midpoints = codebook.midpoints.to(device)
        self.decode_entries = codebook.decode_entries.to(device)
        self.order = self.shift = self.gains = None
        if feedback is not None:
            self.order = feedback.order.to(device, torch.int16).contiguous()
            self.shift = feedback.shift.to(device, torch.float32).contiguous()
            self.gains = gain_panels(feedback).to(device)

    def room(
        self, P: int, H: int, D: int, *, magnitudes: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Where ``shape`` leaves errors and targets of a block's numbers; None without feedback."""
        if self.order is None:
            return None
        size = _block_pages(P, H, D) * H * PAGE_TOKENS * D
        errors = magnitudes
        if errors is None:
            errors = torch.empty(size, dtype=torch.float32, device=device)
        return errors, torch.empty(size, dtype=torch.float32, device=device)

    def shape(
        self,
        numbers: Tensor,
        P: int,
        room: tuple[Tensor, Tensor] | None,
        *,
        of_keys: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
        of_values: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        sharing: int = 1,
        has_outliers: bool,
    ) -> Tensor | None:
        """Targets f32 ``[P, H, D, 256]`` of the first P pages of numbers; None without feedback.

        ``of_keys`` are centre and half-range, ``of_values`` what ``value_scales`` wrote.
        """
        if room is None:
            return None
        H, _, D = numbers.shape
        shape_errors[(P * H, PAGE_TOKENS // SHAPE_TOKENS)](
            numbers,
            *of_keys,
            *of_values,
            self.midpoints,
            self.decode_entries,
            self.order,
            self.shift,
            self.gains,
            *room,
            *numbers.stride()[:2],
            H=H,
            D=D,
            SHARING=sharing,
            BITS=self.bits,
            KEYS=of_keys[0] is not None,
            OUTLIERS=has_outliers,
            TOKENS=SHAPE_TOKENS,
            num_warps=SHAPE_WARPS,
            enable_fp_fusion=False,
        )
        return room[1]


class KeyPacker:
    """Encodes key pages of one layer; its tables are made once."""

    def __init__(
        self, parameters: KeyParameters, config: KVQConfig, *, device: torch.device | str
    ) -> None:
        """``device`` is where the keys will be; ``parameters`` name channels in their order.

        Raises ConfigError where the codebook has another width than ``config``.
        """
        self._tables = PackTables(
            parameters.codebook, parameters.feedback, bits=config.key_bits, device=device
        )
        self._center = parameters.center.float().contiguous().to(device)
        self._half_range = parameters.half_range.float().contiguous().to(device)
        self._outlier_step = parameters.outlier_step
        self._config = config

    def pack(self, keys: Tensor) -> KeyPages:
        """Pages of keys before RoPE, ``[H, P * 256, D]``, any float dtype and strides.

        Base positions are 0: they are the caller's to set.
        """
        keys = _readable(keys)
        H, T, D = keys.shape
        P = T // PAGE_TOKENS
        pages = _uninitialised(KeyPages, self._config, P, H, D, device=keys.device)
        pages.base_positions.zero_()
        has_outliers = pages.outliers.shape[-1] > 0
        scratch = _candidates(P, H, D, device=keys.device) if has_outliers else (None, None)
        room = self._tables.room(P, H, D, magnitudes=scratch[0], device=keys.device)
        with current(keys.device):
            for first, last in _blocks(P, H, D):
                of_page = keys[:, first * PAGE_TOKENS :]
                shaped = self._tables.shape(
                    of_page,
                    last - first,
                    room,
                    of_keys=(self._center, self._half_range),
                    has_outliers=has_outliers,
                )
                pack_key_codes[_code_grid(last - first, H, D)](
                    of_page if shaped is None else shaped,
                    self._center,
                    self._half_range,
                    self._tables.midpoints,
                    self._tables.decode_entries,
                    pages.words[first:last].view(torch.int32),
                    *scratch,
                    *of_page.stride()[:2],
                    self._outlier_step,
                    H=H,
                    D=D,
                    BITS=self._config.key_bits,
                    INDEX_BITS=outliers.channel_bits(D),
                    CHANNELS=_channels(D),
                    OUTLIERS=has_outliers,
                    SHAPED=shaped is not None,
                    num_warps=CODE_WARPS,
                )
                if has_outliers:
                    _select(
                        scratch,
                        pages.outliers[first:last],
                        pages.outlier_counts[first:last],
                        shape=(PAGE_TOKENS, D),
                    )
        return pages


class ValuePacker:
    """Encodes value pages of one layer; its tables are made once."""

    def __init__(
        self, parameters: ValueParameters, config: KVQConfig, *, device: torch.device | str
    ) -> None:
        """``device`` is where the values will be.

        Raises ConfigError where the codebook has another width than ``config``.
        """
        self._tables = PackTables(
            parameters.codebook, parameters.feedback, bits=config.value_bits, device=device
        )
        self._outlier_step = parameters.outlier_step
        self._config = config

    def pack(self, values: Tensor) -> ValuePages:
        """Pages of values ``[H, P * 256, D]``, any float dtype and strides."""
        values = _readable(values)
        H, T, D = values.shape
        P = T // PAGE_TOKENS
        device = values.device
        pages = _uninitialised(ValuePages, self._config, P, H, D, device=device)
        has_outliers = pages.outliers.shape[-1] > 0
        scratch = _candidates(P, H, D, device=device) if has_outliers else (None, None)
        room = self._tables.room(P, H, D, magnitudes=scratch[0], device=device)
        sharing = H if self._config.value_grain == "token" else 1
        per_side = outliers.value_outliers_per_side(self._config, H, D)
        place_bits = (sharing * D - 1).bit_length()
        tokens = max(1, min(PAGE_TOKENS, SCALE_TILE >> place_bits))
        with current(device):
            for first, last in _blocks(P, H, D):
                of_page = values[:, first * PAGE_TOKENS :]
                strides = of_page.stride()[:2]
                scales = pages.scales[first:last]
                bounds = places = None
                if has_outliers:
                    bounds = torch.empty(scales.shape, dtype=torch.float32, device=device)
                    places = torch.empty(scales.shape, dtype=torch.int32, device=device)
                grid = (PAGE_TOKENS * (last - first) // tokens, H // sharing)
                value_scales[grid](
                    of_page,
                    scales,
                    bounds,
                    places,
                    *strides,
                    D=D,
                    SHARING=sharing,
                    PER_SIDE=per_side,
                    TOKENS=tokens,
                    PLACE_BITS=place_bits,
                    LOW_BIT=LOW_BITS[values.dtype],
                    num_warps=max(1, min(SCALE_WARPS, (tokens << place_bits) // SCALE_TILE)),
                )
                shaped = self._tables.shape(
                    of_page,
                    last - first,
                    room,
                    of_values=(scales, bounds, places),
                    sharing=sharing,
                    has_outliers=has_outliers,
                )
                pack_value_codes[_code_grid(last - first, H, D)](
                    of_page,
                    scales,
                    bounds,
                    places,
                    self._tables.midpoints,
                    self._tables.decode_entries,
                    pages.words[first:last].view(torch.int32),
                    *scratch,
                    shaped,
                    *strides,
                    self._outlier_step,
                    H=H,
                    D=D,
                    SHARING=sharing,
                    BITS=self._config.value_bits,
                    INDEX_BITS=outliers.TOKEN_BITS,
                    CHANNELS=_channels(D),
                    OUTLIERS=has_outliers,
                    SHAPED=shaped is not None,
                    num_warps=CODE_WARPS,
                )
                if has_outliers:
                    _select(
                        scratch,
                        pages.outliers[first:last],
                        # Kernels store offsets of 16 bits; reading them as unsigned is torch's.
                        pages.outlier_offsets[first:last].view(torch.int16),
                        shape=(D, PAGE_TOKENS),
                    )
        return pages


def _readable(x: Tensor) -> Tensor:
    """What kernels can read; a copy only of other dtypes and of channels that lie apart."""
    assert x.shape[1] % PAGE_TOKENS == 0
    x = x if x.dtype in LOW_BITS else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _uninitialised(
    kind: type[Pages], config: KVQConfig, P: int, H: int, D: int, *, device: torch.device
) -> Pages:
    sizes = kind.allocate(config, num_pages=P, num_kv_heads=H, head_dim=D, device="meta")
    return kind(
        *(torch.empty_like(getattr(sizes, field.name), device=device) for field in fields(kind))
    )


def scratch_bytes(config: KVQConfig, *, num_pages: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes that packing ``num_pages`` pages holds at its worst moment, the pages included.

    Keys and values come one after the other: the pages of both, targets and candidates of one (or
    its errors, which lie among candidates), and of each value scale its outliers' bounds, twice a
    number and a place.
    """
    sizes: dict[str, Any] = {
        "num_pages": num_pages,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "device": "meta",
    }
    packed = sum(
        sum(allocated_bytes(kind.allocate(config, **sizes)).values())
        for kind in (KeyPages, ValuePages)
    )
    if num_pages == 0:
        return packed
    tokens = _block_pages(num_pages, num_kv_heads, head_dim) * PAGE_TOKENS
    numbers = tokens * num_kv_heads * head_dim
    if config.feedback:
        packed += numbers * TARGET_BYTES
    if config.outlier_fraction == 0:
        return packed + numbers * ERROR_BYTES * config.feedback
    scales = 1 if config.value_grain == "token" else num_kv_heads
    return packed + numbers * CANDIDATE_BYTES + 16 * tokens * scales


def _blocks(P: int, H: int, D: int) -> Iterator[tuple[int, int]]:
    """First page and the one after the last of blocks whose candidates find room."""
    step = _block_pages(P, H, D)
    return ((first, min(first + step, P)) for first in range(0, P, step))


def _block_pages(P: int, H: int, D: int) -> int:
    return max(1, min(P, SCRATCH_BYTES // (CANDIDATE_BYTES * H * PAGE_TOKENS * D)))


def _candidates(P: int, H: int, D: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Magnitudes f32 and entries i16 of a block's numbers, of any contents."""
    size = _block_pages(P, H, D) * H * PAGE_TOKENS * D
    return (
        torch.empty(size, dtype=torch.float32, device=device),
        torch.empty(size, dtype=torch.int16, device=device),
    )


def _channels(D: int) -> int:
    return min(CHANNELS, int(triton.next_power_of_2(D)))


def _code_grid(P: int, H: int, D: int) -> tuple[int, int]:
    return P * H, int(triton.cdiv(D, _channels(D)))


def _select(
    scratch: tuple[Any, Any], pools: Tensor, counts: Tensor, *, shape: tuple[int, int]
) -> None:
    """Fill pools i16 ``[P, H, capacity]`` from candidates of ``shape`` rows and columns a pool."""
    rows, columns = shape
    width = int(triton.next_power_of_2(columns))
    select_outliers[(pools.shape[0] * pools.shape[1],)](
        *scratch,
        pools,
        counts,
        ROWS=rows,
        COLUMNS=columns,
        CAPACITY=pools.shape[-1],
        OFFSETS=counts.shape[-1] > rows,
        CHUNK=CHUNK,
        CHUNK_ROWS=min(CHUNK // width, int(triton.next_power_of_2(rows))),
        WIDTH=width,
        num_warps=SELECT_WARPS,
    )
