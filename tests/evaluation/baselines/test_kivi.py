from __future__ import annotations

import pytest
import torch

from kvq_evaluation.baselines.kivi import Kivi
from kvq_formats.errors import ConfigError


def test_keys_by_hand() -> None:
    # Two channels, groups of two tokens, one bit. A group decodes to its two ends, so complete
    # groups are exact whatever the other channel holds; the fifth token is a group of its own.
    keys = torch.tensor([[[0.0, 100.0], [1.0, 300.0], [5.0, -7.0], [9.0, -7.0], [4.0, 2.0]]])
    assert torch.equal(Kivi(bits=1, layers=[0], group=2).decoded_keys(0, keys), keys)
    # Groups of three, tokens 0-2 and 3-4. Channel 0: 0, 1, 5 -> 0, 0, 5. Channel 1: 100, 300, -7:
    # middle 146.5 -> -7, 300, -7. The second group has two tokens, exact.
    decoded = Kivi(bits=1, layers=[0], group=3).decoded_keys(0, keys)
    expected = torch.tensor([[[0.0, -7.0], [0.0, 300.0], [5.0, -7.0], [9.0, -7.0], [4.0, 2.0]]])
    # The step 307 is an fp16 number, and so are both zeros.
    assert torch.equal(decoded, expected)


def test_values_by_hand() -> None:
    # Groups of two channels, one bit: exact. One group of four: 0, 4, 0, 9 -> 0, 0, 0, 9.
    values = torch.tensor([[[0.0, 4.0, 0.0, 9.0]]])
    assert torch.equal(Kivi(bits=1, layers=[0], group=2).decoded_values(0, values), values)
    decoded = Kivi(bits=1, layers=[0], group=4).decoded_values(0, values)
    assert decoded.tolist() == [[[0.0, 0.0, 0.0, 9.0]]]


def test_a_wide_channel_costs_the_others_nothing() -> None:
    keys = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    wide = keys.clone()
    wide[..., 3] *= 1000
    others = torch.arange(16) != 3
    codec = Kivi(bits=2, layers=[0])
    before, after = codec.decoded_keys(0, keys), codec.decoded_keys(0, wide)
    assert torch.equal(before[..., others], after[..., others])
    # As values, groups run over channels and it takes their codes.
    before, after = codec.decoded_values(0, keys), codec.decoded_values(0, wide)
    assert not torch.equal(before[..., others], after[..., others])


def test_a_complete_group_is_final() -> None:
    keys = torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(1))
    codec = Kivi(bits=2, layers=[0])
    decoded = codec.decoded_keys(0, keys)
    assert torch.equal(decoded[:, :64], codec.decoded_keys(0, keys[:, :64]))
    assert torch.equal(decoded[:, :32], codec.decoded_keys(0, keys[:, :40])[:, :32])


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("head_dim", [31, 33, 64, 80])
def test_shape_and_dtype_stay(tokens: int, head_dim: int) -> None:
    x = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(2))
    codec = Kivi(bits=2, layers=[0])
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.is_contiguous()
        assert decoded.isfinite().all()


def test_error_falls_with_bits() -> None:
    keys = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    errors = [
        float((Kivi(bits=b, layers=[0]).decoded_keys(0, keys) - keys).square().sum())
        for b in (2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_effective_bits() -> None:
    assert Kivi(bits=2, layers=[0]).effective_bits(8, 128) == 3.0
    assert Kivi(bits=4, layers=[0], group=64).effective_bits(8, 128) == 4.5
    # 49 tokens, a sink: keys of 48 tokens are groups of 32 and 16, a channel 8 + 4 and 4 + 4 bytes,
    # 160 bits for 48 numbers; values 3 bits. The sink is one of 49 at 16 bits.
    counted = Kivi(bits=2, layers=[0]).effective_bits(2, 64, tokens=49)
    assert counted == pytest.approx((48 * (160 / 48 + 3) / 2 + 16) / 49)
    # 97 tokens, a sink and 64 recent ones exact: one complete group of 32 at 3 bits.
    residual = Kivi(bits=2, layers=[0], recent_tokens=64).effective_bits(2, 64, tokens=97)
    assert residual == pytest.approx((32 * 3 + 65 * 16) / 97)


@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_a_text_within_the_residual_is_exact(tokens: int) -> None:
    codec = Kivi(bits=2, layers=[0], recent_tokens=64)
    assert codec.effective_bits(2, 64, tokens=tokens) == 16


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 2, "group": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Kivi(layers=[0], **options)
