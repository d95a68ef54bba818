"""Fast decoding against the specification, number for number.

Both do the same f32 operations in the same order (table entry + residual, times half-range, plus
centre), so equality is exact: no tolerance anywhere.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats import outliers, pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.errors import ConfigError
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, ValueParameters
from kvq_kernels.dequantize import KeyDequantizer, ValueDequantizer, apply_scales

HEAD_DIMS = [2, 16, 64, 80, 96, 128, 256]


def codebook(bits: int) -> Codebook:
    """Entries without symmetry, so that no two codes can be mistaken for each other."""
    return Codebook.fit_grid(torch.linspace(-1, 1.2, 1 << bits).sinh())


def key_parameters(bits: int, H: int, D: int) -> KeyParameters:
    generator = torch.Generator().manual_seed(7)
    return KeyParameters(
        center=torch.randn(H, D, generator=generator) / 8,
        half_range=torch.rand(H, D, generator=generator) + 0.5,
        codebook=codebook(bits),
        outlier_step=0.013,
    )


def value_parameters(bits: int) -> ValueParameters:
    return ValueParameters(codebook=codebook(bits), outlier_step=0.07)


def paged(decoded: Tensor, P: int) -> Tensor:
    """``[H, P * 256, D]`` of the specification -> ``[P, H, 256, D]``."""
    H, _, D = decoded.shape
    return decoded.view(H, P, 256, D).movedim(0, 1)


def assert_keys_equal(packed: KeyPages, parameters: KeyParameters) -> None:
    P, H, bits, _, D = packed.words.shape
    decoded = KeyDequantizer(parameters, bits=bits, device="cpu").dequantize(packed)
    assert decoded.shape == (P, H, 256, D)
    assert decoded.is_contiguous()
    expected = paged(pages.decode_keys(packed, parameters, tokens=P * 256), P)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0)


def assert_values_equal(packed: ValuePages, parameters: ValueParameters) -> None:
    P, H, bits, D, _ = packed.words.shape
    S = packed.scales.shape[1]
    dequantizer = ValueDequantizer(parameters, bits=bits, device="cpu")
    normalised, half_range, center = dequantizer.dequantize(packed)
    assert normalised.shape == (P, H, D, 256)
    assert half_range.shape == center.shape == (P, S, 256)
    assert all(t.is_contiguous() for t in (normalised, half_range, center))
    decoded = apply_scales(normalised, half_range, center)
    expected = paged(pages.decode_values(packed, parameters, tokens=P * 256), P)
    # A scale of random bytes may be infinite or no number.
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)


def heavy(H: int, T: int, D: int) -> Tensor:
    """Keys or values with a heavy tail."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(H, T, D, generator=generator) / 4
    return x * torch.where(torch.rand(H, T, D, generator=generator) < 0.02, 6.0, 1.0)


OUTLIERS: dict[str, dict[str, float]] = {
    "off": {"outlier_fraction": 0.0},
    "room": {"outlier_capacity": 0.2, "value_capacity_factor": 4},
    "overflowing": {"outlier_capacity": 0.002, "value_capacity_factor": 1},
}


def config(bits: int, amount: str, *, grain: str = "token") -> KVQConfig:
    return KVQConfig(key_bits=bits, value_bits=bits, value_grain=grain, **OUTLIERS[amount])


@pytest.mark.parametrize("amount", OUTLIERS)
@pytest.mark.parametrize("tokens", [0, 40, 256, 700])
@pytest.mark.parametrize(("H", "D"), [(1, 16), (3, 64), (2, 80), (2, 128), (1, 256)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_encoded_pages_decode_as_specified(
    bits: int, H: int, D: int, tokens: int, amount: str
) -> None:
    x = heavy(H, tokens, D)
    key, value = key_parameters(bits, H, D), value_parameters(bits)
    keys = pages.encode_keys(x, key, config(bits, amount))
    assert keys.words.shape[0] == -(-tokens // 256)
    assert_keys_equal(keys, key)
    for grain in ("token", "head"):
        values = pages.encode_values(x, value, config(bits, amount, grain=grain))
        assert values.scales.shape[1] == (1 if grain == "token" else H)
        assert_values_equal(values, value)


def test_the_amounts_of_outliers_are_what_they_are_called() -> None:
    packed = {
        amount: pages.encode_keys(heavy(2, 256, 64), key_parameters(3, 2, 64), config(3, amount))
        for amount in OUTLIERS
    }
    used = {a: p.outlier_counts.sum(-1).tolist() for a, p in packed.items()}
    assert packed["off"].outliers.shape[-1] == 0
    assert 0 < max(used["room"][0]) < packed["room"].outliers.shape[-1]
    assert used["overflowing"] == [[packed["overflowing"].outliers.shape[-1]] * 2]


def random_int16(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)


def random_runs(P: int, H: int, rows: int, most: int, generator: torch.Generator) -> Tensor:
    """Lengths i64 ``[P, H, rows]`` of runs, of up to ``2 * most`` entries in all, bunched."""
    row = (torch.rand(P, H, 2 * most, generator=generator) ** 3 * rows).long()
    total = torch.randint(0, 2 * most + 1, (P, H, 1), generator=generator)
    present = torch.arange(2 * most) < total
    return torch.zeros(P, H, rows).long().scatter_add(-1, row, present.long()).clamp(max=255)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    P=st.integers(0, 3),
    H=st.integers(1, 3),
    D=st.sampled_from(HEAD_DIMS),
    capacity=st.sampled_from([0, 8, 48, 328]),
    seed=st.integers(0, 2**31),
)
def test_any_bytes_decode_as_specified(
    bits: int, P: int, H: int, D: int, capacity: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    index_bits = outliers.channel_bits(D)
    # Any word of a pool that names a channel of the head; several may name the same.
    entries = random_int16((P, H, capacity), generator)
    channel = (entries.int() & ((1 << index_bits) - 1)) % D
    entries = (entries.int() >> index_bits << index_bits | channel).to(torch.int16)
    counts = random_runs(P, H, 256 if capacity else 0, capacity, generator)
    keys = KeyPages(
        words=random_int16((P, H, bits, 16, D), generator),
        outliers=entries,
        outlier_counts=counts.to(torch.uint8),
        base_positions=torch.zeros(P, dtype=torch.int32),
    )
    assert_keys_equal(keys, key_parameters(bits, H, D))

    offsets = torch.zeros(P, H, D + 1 if capacity else 0, dtype=torch.int32)
    if capacity:
        offsets[..., 1:] = random_runs(P, H, D, capacity, generator).cumsum(-1)
    values = ValuePages(
        words=random_int16((P, H, bits, D, 16), generator),
        scales=random_int16((P, 1 if seed % 2 else H, 256, 2), generator).view(torch.float16),
        outliers=random_int16((P, H, capacity), generator),
        outlier_offsets=offsets.to(torch.uint16),
    )
    assert_values_equal(values, value_parameters(bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_places_beyond_the_last_run_are_ignored(bits: int) -> None:
    D = 80
    room = config(bits, "room")
    key, value = key_parameters(bits, 2, D), value_parameters(bits)
    keys = pages.encode_keys(heavy(2, 512, D), key, room)
    values = pages.encode_values(heavy(2, 512, D), value, room)
    clean_keys = KeyDequantizer(key, bits=bits, device="cpu").dequantize(keys)
    clean_values = ValueDequantizer(value, bits=bits, device="cpu").dequantize(values)[0]
    for pools, ends in (
        (keys.outliers, keys.outlier_counts.sum(-1)),
        (values.outliers, values.outlier_offsets.int()[..., -1]),
    ):
        unused = torch.arange(pools.shape[-1]) >= ends[..., None]
        assert unused.any(-1).all()
        # All ones: the largest channel that an entry can name, 127, is beyond 80.
        pools.masked_fill_(unused, -1)
    assert torch.equal(KeyDequantizer(key, bits=bits, device="cpu").dequantize(keys), clean_keys)
    dirty = ValueDequantizer(value, bits=bits, device="cpu").dequantize(values)[0]
    assert torch.equal(dirty, clean_values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_views_and_gathers_of_a_slab_decode_alike(bits: int) -> None:
    D = 64
    room = config(bits, "room")
    key, value = key_parameters(bits, 2, D), value_parameters(bits)
    keys = pages.encode_keys(heavy(2, 1280, D), key, room)
    values = pages.encode_values(heavy(2, 1280, D), value, room)
    key_dequantizer = KeyDequantizer(key, bits=bits, device="cpu")
    value_dequantizer = ValueDequantizer(value, bits=bits, device="cpu")
    all_keys = key_dequantizer.dequantize(keys)
    all_values = apply_scales(*value_dequantizer.dequantize(values))
    chosen = torch.tensor([4, 0, 3])
    for part in (slice(1, 3), slice(0, 5, 2), chosen):

        def cut(x: KeyPages | ValuePages, part: slice | Tensor = part) -> dict[str, Tensor]:
            return {field.name: getattr(x, field.name)[part] for field in fields(x)}

        some_keys = key_dequantizer.dequantize(KeyPages(**cut(keys)))
        some_values = apply_scales(*value_dequantizer.dequantize(ValuePages(**cut(values))))
        assert torch.equal(some_keys, all_keys[part])
        assert torch.equal(some_values, all_values[part])

    # Heads as the slowest axis in memory.
    def heads_first(x: KeyPages | ValuePages) -> dict[str, Tensor]:
        tensors = {field.name: getattr(x, field.name) for field in fields(x)}
        return {
            name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t
            for name, t in tensors.items()
        }

    moved_keys, moved_values = KeyPages(**heads_first(keys)), ValuePages(**heads_first(values))
    assert not moved_keys.words.is_contiguous()
    assert not moved_keys.outliers.is_contiguous()
    assert torch.equal(key_dequantizer.dequantize(moved_keys), all_keys)
    assert torch.equal(apply_scales(*value_dequantizer.dequantize(moved_values)), all_values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding_only_reads(bits: int) -> None:
    room = config(bits, "room")
    key, value = key_parameters(bits, 2, 64), value_parameters(bits)
    keys = pages.encode_keys(heavy(2, 512, 64), key, room)
    values = pages.encode_values(heavy(2, 512, 64), value, room)
    key_dequantizer = KeyDequantizer(key, bits=bits, device="cpu")
    value_dequantizer = ValueDequantizer(value, bits=bits, device="cpu")
    read: tuple[tuple[KeyPages | ValuePages, str], ...] = tuple(
        (packed, field.name) for packed in (keys, values) for field in fields(packed)
    )
    before = [getattr(packed, name).clone() for packed, name in read]
    parameters = key.center.clone(), key.half_range.clone()
    first_keys = key_dequantizer.dequantize(keys)
    first_values = value_dequantizer.dequantize(values)
    # What is returned is the caller's: writing to it changes neither pages nor tables.
    kept = first_keys.clone(), [t.clone() for t in first_values]
    for tensor in (first_keys, *first_values):
        tensor.zero_()
    for (packed, name), old in zip(read, before, strict=True):
        assert torch.equal(getattr(packed, name).view(torch.uint8), old.view(torch.uint8)), name
    assert torch.equal(key.center, parameters[0])
    assert torch.equal(key.half_range, parameters[1])
    assert torch.equal(key_dequantizer.dequantize(keys), kept[0])
    for again, once in zip(value_dequantizer.dequantize(values), kept[1], strict=True):
        assert torch.equal(again, once)


@pytest.mark.parametrize(("bits", "codebook_bits"), [(1, 1), (5, 5), (3, 4), (4, 2)])
def test_widths_that_cannot_be_decoded_are_refused(bits: int, codebook_bits: int) -> None:
    found = f"codes of {bits} bits .* codebook of {codebook_bits} bits"
    with pytest.raises(ConfigError, match=found) as refused:
        KeyDequantizer(key_parameters(codebook_bits, 1, 16), bits=bits, device="cpu")
    assert "kvq calibrate" in (refused.value.hint or "")
    with pytest.raises(ConfigError, match=found):
        ValueDequantizer(value_parameters(codebook_bits), bits=bits, device="cpu")
