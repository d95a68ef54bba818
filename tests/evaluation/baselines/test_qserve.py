from __future__ import annotations

from typing import Any

import pytest
import torch

from kvq_evaluation.baselines.int_per_token_head import IntPerTokenHead
from kvq_evaluation.baselines.qserve import QServe, smoothing_scales
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError


def samples(rotated_keys: torch.Tensor) -> LayerSamples:
    # Only keys after RoPE count; NaN elsewhere would show.
    unread = torch.full_like(rotated_keys, float("nan"))
    return LayerSamples(keys=unread, rotated_keys=rotated_keys, values=unread, queries=unread)


def test_scales_by_hand() -> None:
    # Largest magnitudes 4, 1, 16, 9: the pairs (0, 2) and (1, 3) take 16 and 9, rooted 4 and 3.
    keys = torch.tensor([[[4.0, -1.0, 2.0, 0.0]], [[-1.0, 1.0, -16.0, 9.0]]])
    assert torch.equal(smoothing_scales(keys, 0.5), torch.tensor([[4.0, 3.0, 4.0, 3.0]]))


def test_a_pair_of_zeros_is_not_scaled() -> None:
    keys = torch.tensor([[[0.0, 4.0, 0.0, -9.0]]])
    assert torch.equal(smoothing_scales(keys, 0.5), torch.tensor([[1.0, 3.0, 1.0, 3.0]]))
    codec = QServe.calibrated({0: samples(keys)})
    assert codec.decoded_keys(0, torch.zeros(1, 2, 4)).eq(0).all()


def test_a_vector_by_hand() -> None:
    codec = QServe(2, {0: torch.tensor([[4.0, 3.0, 4.0, 3.0]])})
    vectors = torch.tensor([[[0.0, 3.0, 8.0, 9.0]]])
    # Divided by the scales 0, 1, 2, 3: a step of 1, so nothing is lost.
    assert torch.equal(codec.decoded_keys(0, vectors), vectors)
    # Not divided the step is 3, and 8 goes to 9.
    expected = torch.tensor([[[0.0, 3.0, 9.0, 9.0]]])
    assert torch.equal(codec.decoded_values(0, vectors), expected)


def test_without_smoothing_it_is_round_to_nearest() -> None:
    keys = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(0))
    codec = QServe.calibrated({0: samples(keys)}, bits=3, alpha=0.0)
    plain = IntPerTokenHead(bits=3, layers=[0])
    rows = keys.transpose(0, 1)
    assert torch.equal(codec.decoded_keys(0, rows), plain.decoded_keys(0, rows))


def test_smoothing_saves_the_narrow_channels() -> None:
    keys = torch.randn(200, 1, 64, generator=torch.Generator().manual_seed(1))
    keys[..., 5] *= 100
    rows = keys.transpose(0, 1)
    codecs = (QServe.calibrated({0: samples(keys)}), IntPerTokenHead(bits=4, layers=[0]))
    # Channel 37 shares the scale of channel 5.
    narrow = [channel for channel in range(64) if channel not in (5, 37)]
    smoothed, plain = (
        (c.decoded_keys(0, rows) - rows)[..., narrow].square().mean() for c in codecs
    )
    assert smoothed < plain


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_shapes(tokens: int) -> None:
    codec = QServe.calibrated({2: samples(torch.ones(4, 2, 80))})
    assert list(codec.layers) == [2]
    for decode in (codec.decoded_keys, codec.decoded_values):
        decoded = decode(2, torch.ones(2, tokens, 80))
        # A constant head is its own zero.
        assert torch.equal(decoded, torch.ones(2, tokens, 80))


def test_effective_bits() -> None:
    # 128 codes of 4 bits take 64 bytes, scale and zero 4: 544 bits for 128 numbers.
    assert QServe(4, {}).effective_bits(8, 128) == 4.25
    assert QServe(4, {}).effective_bits(8, 128, tokens=50) == pytest.approx(0.98 * 4.25 + 0.32)


@pytest.mark.parametrize("options", [{"bits": 0}, {"alpha": -0.1}, {"alpha": 1.1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        QServe.calibrated({}, **options)
