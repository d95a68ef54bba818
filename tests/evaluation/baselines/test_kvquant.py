from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_evaluation.baselines.kvquant import KVQuant, LayerTables
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError

THIRD = 1 / 3


def _tables(lower: list[float], upper: list[float], codebook: list[float]) -> LayerTables:
    entries = torch.tensor(codebook)
    return LayerTables(torch.tensor(lower), torch.tensor(upper), entries, entries)


def _samples(
    keys: Tensor, values: Tensor | None = None, sensitivity: Tensor | None = None
) -> LayerSamples:
    return LayerSamples(
        keys=keys,
        rotated_keys=-7 * keys,
        values=keys if values is None else values,
        queries=keys,
        key_sensitivity=sensitivity,
        value_sensitivity=sensitivity,
    )


def test_keys_by_hand() -> None:
    # Two heads of one channel. Channel 0: centre 10, half-range 3, entries 7, 9, 11, 13.
    # Channel 1: centre 0, half-range 6, entries -6, -2, 2, 6.
    tables = {2: _tables([7.0, -6.0], [13.0, 6.0], [-1, -THIRD, THIRD, 1])}
    keys = torch.tensor([[[10.9], [20.0], [7.0]], [[-3.9], [-4.1], [-60.0]]])
    decoded = KVQuant(2, tables).decoded_keys(2, keys)
    # 20 and -60 are outliers and kept; without outliers they clamp to 13 and -6.
    expected = torch.tensor([[[11.0], [20.0], [7.0]], [[-2.0], [-6.0], [-60.0]]])
    # A product and a sum in f32, of numbers up to 16.
    assert torch.allclose(decoded, expected, rtol=0, atol=2e-6)
    assert decoded[0, 1, 0] == 20
    clamped = KVQuant(2, tables, outlier_fraction=0.0).decoded_keys(2, keys)
    assert (float(clamped[0, 1, 0]), float(clamped[1, 2, 0])) == (13.0, -6.0)


def test_values_by_hand() -> None:
    # C = 8: int(0.005 * 8) + 1 = 1 outlier a side, 100 and -50. The rest spans 0..5: entries
    # 2.5 * (1 + (-1, -0.4, 0.4, 1)) = 0, 1.5, 3.5, 5, borders 0.75, 2.5, 4.25.
    tables = {0: _tables([0.0], [1.0], [-1, -0.4, 0.4, 1])}
    values = torch.tensor([[[100.0, 0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0, -50.0]]])
    decoded = KVQuant(2, tables).decoded_values(0, values)
    expected = [100.0, 0.0, 1.5, 1.5, 3.5, 3.5, 5.0, -50.0]
    assert decoded.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    # Without outliers -50..100: centre 25, half-range 75, entries -50, -5, 55, 100, borders -27.5
    # and 25.
    plain = KVQuant(2, tables, outlier_fraction=0.0).decoded_values(0, values)
    expected = [100.0, -5.0, -5.0, -5.0, -5.0, -5.0, -5.0, -50.0]
    assert plain.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_thresholds_are_quantiles_of_a_channel() -> None:
    # 0, ..., 100 in any order: the 5 % and 95 % quantiles are 5 and 95; head 1 holds ten times it.
    numbers = torch.randperm(101, generator=torch.Generator().manual_seed(0)).float()
    keys = torch.stack([numbers, 10 * numbers], dim=1)[..., None]
    codec = KVQuant.calibrated({4: _samples(keys)}, bits=2, outlier_fraction=0.1)
    assert list(codec.layers) == [4]
    # Linear interpolation at place 0.05 * 100, a rounding away from 5.
    assert codec.tables[4].key_lower.tolist() == pytest.approx([5, 50], rel=1e-6)
    assert codec.tables[4].key_upper.tolist() == pytest.approx([95, 950], rel=1e-6)
    assert not codec.rotated_keys


def test_codebook_of_four_levels_by_hand() -> None:
    # Both channels hold -1, -1/3, 1/3, 1 of their range: four clusters without error.
    keys = torch.tensor([[7.0, -6], [9, -2], [11, 2], [13, 6]])[:, None]
    # A value token of four heads is normalised over all of its channels: the same four levels.
    values = torch.tensor([[0.0, 2, 4, 6], [100, 110, 120, 130], [-1, 1, -1, 1], [9, 6, 0, 3]])
    codec = KVQuant.calibrated(
        {0: _samples(keys, values[..., None])}, bits=2, outlier_fraction=0.0, sink_tokens=3
    )
    assert codec.tables[0].key_codebook.tolist() == pytest.approx([-1, -THIRD, THIRD, 1])
    assert codec.tables[0].value_codebook.tolist() == pytest.approx([-1, -THIRD, THIRD, 1])
    assert codec.sink_tokens == 3


def test_weights_know_nothing_of_the_range() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(200, 1, 4, generator=generator)
    sensitivity = torch.rand(200, 1, 4, generator=generator)
    wider = keys * torch.tensor([1.0, 64.0, 1.0, 1.0])
    books = [
        KVQuant.calibrated({0: _samples(x, keys, sensitivity)}, bits=3).tables[0].key_codebook
        for x in (keys, wider)
    ]
    # A factor of two to the sixth is exact, so normalised keys are the same.
    assert torch.equal(*books)
    unweighted = KVQuant.calibrated({0: _samples(keys)}, bits=3).tables[0].key_codebook
    assert not torch.equal(books[0], unweighted)


def test_sensitive_numbers_get_the_entries() -> None:
    keys = torch.linspace(-1, 1, 401).reshape(401, 1, 1)
    # All of the weight in [0.5, 1]: four entries at the middles of its four parts.
    codec = KVQuant.calibrated(
        {0: _samples(keys, sensitivity=(keys >= 0.5).float())}, bits=2, outlier_fraction=0.0
    )
    # 101 points a step of 0.005 apart: parts of 25 and 26, so middles move by half a step.
    expected = [0.5625, 0.6875, 0.8125, 0.9375]
    assert codec.tables[0].key_codebook.tolist() == pytest.approx(expected, abs=0.0025 + 1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (1, 80), (1, 2), (1, 1)])
def test_shape_and_dtype_stay(tokens: int, heads: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(50, heads, head_dim, generator=generator)
    codec = KVQuant.calibrated({0: _samples(keys)}, bits=3)
    x = torch.randn(heads, tokens, head_dim, generator=generator)
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.is_contiguous()
        assert decoded.isfinite().all()


def test_a_constant_channel_stays() -> None:
    # As a key bias without input would be.
    keys = torch.randn(60, 1, 8, generator=torch.Generator().manual_seed(3))
    keys[..., 2] = 200.3
    decoded = KVQuant.calibrated({0: _samples(keys)}, bits=2).decoded_keys(0, keys.transpose(0, 1))
    # The half-range is one rounding of the centre.
    assert (decoded[..., 2] - 200.3).abs().max() <= 200.3 * 2.0**-22


def test_error_falls_with_bits_and_with_outliers() -> None:
    generator = torch.Generator().manual_seed(4)
    # Heavy tails: a ratio of normal numbers.
    keys = torch.randn(500, 2, 64, generator=generator) / (
        0.3 + torch.rand(500, 2, 64, generator=generator)
    )
    x = keys.transpose(0, 1)

    def errors(**options: Any) -> list[float]:
        codec = KVQuant.calibrated({0: _samples(keys)}, **options)
        decoded = (codec.decoded_keys(0, x), codec.decoded_values(0, x))
        return [float((y - x).square().sum()) for y in decoded]

    for worse, better in [
        (errors(bits=2), errors(bits=3)),
        (errors(bits=3), errors(bits=4)),
        (errors(bits=3, outlier_fraction=0.0), errors(bits=3)),
    ]:
        assert worse[0] > better[0]
        assert worse[1] > better[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_as_the_code_stores_them(bits: int) -> None:
    # C = 4096. Keys: 40.96 outliers a token of 64 bits and a tenth of an int32, an int32 a token:
    # 0.672 + 0.0078125. Values: int(20.48) + 1 = 21 a side, 42 * 64 / 4096 = 0.65625, and a
    # codebook of 2**bits f32 a token, 2**bits / 128.
    counted = KVQuant(bits, {}).effective_bits(32, 128)
    assert counted == pytest.approx(bits + (0.6798125 + 0.65625 + 2**bits / 128) / 2)
    # Its own capped keys take 42 slots as the values do: 3.39, 4.34 and 5.99 times less than 16
    # bits. Uncapped ones cost (0.6798125 - 0.65625) / 2 = 0.0118 bits more.
    published = {4: 3.39, 3: 4.34, 2: 5.99}[bits]
    assert 16 / (counted - 0.0118) == pytest.approx(published, abs=0.006)


def test_bits_as_the_paper_counts_them() -> None:
    # Keys 0.01 * 32; values 42 * 32 / 4096 = 0.328125, and 32 / 4096 for scale and offset.
    counted = KVQuant(3, {}, storage="paper").effective_bits(32, 128)
    assert counted == pytest.approx(3 + (0.32 + 0.328125 + 0.0078125) / 2)
    # C = 128: one outlier a side, 2 * 32 / 128 = 0.5, and 32 / 128.
    small = KVQuant(3, {}, storage="paper").effective_bits(2, 64)
    assert small == pytest.approx(3 + (0.32 + 0.5 + 0.25) / 2)
    sunk = KVQuant(3, {}, storage="paper", sink_tokens=1).effective_bits(2, 64, tokens=10)
    assert sunk == pytest.approx(0.9 * small + 1.6)


def test_bits_without_outliers() -> None:
    counted = KVQuant(2, {}, outlier_fraction=0.0).effective_bits(32, 128)
    # Four f32 entries a token of values: 128 / 4096, keys none.
    assert counted == 2 + 0.03125 / 2
    paper = KVQuant(2, {}, outlier_fraction=0.0, storage="paper").effective_bits(32, 128)
    assert paper == 2 + 0.0078125 / 2


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"bits": 9}, {"outlier_fraction": -0.1}, {"outlier_fraction": 0.5}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        KVQuant(**{"bits": 3, "tables": {}, **options})


def test_another_storage_is_refused() -> None:
    with pytest.raises(ConfigError, match="'disk'; expected 'code' or 'paper'"):
        KVQuant(3, {}, storage="disk")  # type: ignore[arg-type]
