from __future__ import annotations

from typing import Any

import pytest
import torch

from kvq_evaluation.baselines.gear import Gear, extremes, low_rank
from kvq_evaluation.baselines.kivi import Kivi
from kvq_formats.errors import ConfigError


def test_outliers_by_hand() -> None:
    # One channel of four tokens, half of them apart: the smallest, -9, and the largest, 15. The
    # mean 2.5 takes their place: 2.5, 1, 3, 2.5. One bit, ends 1 and 3: 2.5 and 3 -> 3, 1 -> 1.
    # The outliers come back as they are.
    keys = torch.tensor([[[-9.0], [1.0], [3.0], [15.0]]])
    codec = Gear(bits=1, layers=[0], group=4, rank=0, outlier_fraction=0.5)
    assert torch.equal(codec.decoded_keys(0, keys), keys)
    # With all four in one group of KIVI: -9 and 15 are the ends, 1 (10 of 24 up) -> -9, 3 (12 of
    # 24, the tie to even) -> -9.
    plain = Gear(bits=1, layers=[0], group=4, rank=0, outlier_fraction=0.0)
    assert plain.decoded_keys(0, keys).flatten().tolist() == [-9.0, -9.0, -9.0, 15.0]


def test_outliers_of_values_run_over_heads() -> None:
    # One token, two heads of two channels: the largest and the smallest of all four are apart.
    values = torch.tensor([[[100.0, 1.0]], [[2.0, -50.0]]])
    codec = Gear(bits=1, layers=[0], group=2, rank=0, outlier_fraction=0.5)
    # Mean 13.25 in their place: groups (13.25, 1) and (2, 13.25), whose ends are exact at one bit.
    assert torch.equal(codec.decoded_values(0, values), values)
    assert extremes(torch.tensor([100.0, 1.0, 2.0, -50.0]), 0.5).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_low_rank_by_hand() -> None:
    # diag(3, 2): the best matrix of rank 1 is diag(3, 0). All factors are fp16 numbers.
    residual = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert low_rank(residual, 1).tolist() == [[[3.0, 0.0], [0.0, 0.0]]]
    assert torch.equal(low_rank(residual, 2), residual)
    assert torch.equal(low_rank(residual, 0), torch.zeros(1, 2, 2))


def test_low_rank_is_the_singular_value_decomposition() -> None:
    residual = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    left, scales, right = torch.linalg.svd(residual, full_matrices=False)
    expected = (left[..., :4] * scales[..., None, :4]) @ right[..., :4, :]
    # Each of the four terms is a product of two fp16 roundings, 2**-11 each.
    bound = 4 * 2 * 2**-11 * float(scales.max())
    assert torch.allclose(low_rank(residual, 4), expected, rtol=0, atol=bound)


def test_without_extras_it_is_kivi() -> None:
    x = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(1))
    gear = Gear(bits=2, layers=[0], rank=0, outlier_fraction=0.0)
    kivi = Kivi(bits=2, layers=[0], group=64)
    assert torch.equal(gear.decoded_keys(0, x), kivi.decoded_keys(0, x))
    assert torch.equal(gear.decoded_values(0, x), kivi.decoded_values(0, x))
    for tokens in (None, 1, 70, 2048):
        assert gear.effective_bits(2, 64, tokens=tokens) == kivi.effective_bits(
            2, 64, tokens=tokens
        )


@pytest.mark.parametrize("name", ["decoded_keys", "decoded_values"])
def test_each_part_takes_error_away(name: str) -> None:
    # Heavy tails, and something that most tokens share.
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 256, 64, generator=generator) ** 3

    def error(**options: Any) -> float:
        decoded = getattr(Gear(layers=[0], **options), name)(0, x)
        return float((decoded - x).square().sum())

    plain = error(bits=2, rank=0, outlier_fraction=0.0)
    assert error(bits=2, rank=4, outlier_fraction=0.0) < plain
    assert error(bits=2, rank=0) < plain
    assert error(bits=2, rank=4) < error(bits=2, rank=0)
    assert error(bits=2) > error(bits=3) > error(bits=4)


def test_it_is_deterministic() -> None:
    x = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(3))
    codec = Gear(bits=2, layers=[0])
    assert torch.equal(codec.decoded_keys(0, x), codec.decoded_keys(0, x))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_shape_and_dtype_stay(tokens: int, head_dim: int) -> None:
    x = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(4))
    codec = Gear(bits=2, layers=[0])
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.is_contiguous()
        assert decoded.isfinite().all()


def test_effective_bits() -> None:
    # Codes and groups of 64: 2 + 32 / 64. Factors: 16 * 4 / 128 = 0.5. Outliers, 32 bits each: of
    # keys 0.02; of a token's 1024 values int(10.24) = 10 a side, 20 / 1024.
    counted = Gear(bits=2, layers=[0]).effective_bits(8, 128)
    assert counted == pytest.approx(2.5 + 0.5 + 16 * (0.02 + 20 / 1024))
    # 201 tokens, a sink, heads of 64. Keys: 3 groups of 64 and one of 8, a channel 3 * 20 + 6
    # bytes, 528 bits for 200 numbers; values 2.5. Factors: 4 * (200 + 64) numbers of 16 bits for
    # 200 * 64. Outliers: int(2) = 2 a side of 200 keys; int(1.28) = 1 a side of 128 values.
    coded = (528 / 200 + 2.5) / 2 + 16 * 4 * 264 / (200 * 64) + 16 * (4 / 200 + 2 / 128)
    counted = Gear(bits=2, layers=[0]).effective_bits(2, 64, tokens=201)
    assert counted == pytest.approx((200 * coded + 16) / 201)
    assert Gear(bits=2, layers=[0], recent_tokens=64).effective_bits(2, 64, tokens=65) == 16


@pytest.mark.parametrize(
    "options",
    [{"bits": 9}, {"group": 0}, {"rank": -1}, {"outlier_fraction": 1.0}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Gear(**{"bits": 2, "layers": [0], **options})
