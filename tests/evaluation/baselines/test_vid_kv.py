from __future__ import annotations

from typing import Any

import pytest
import torch

from kvq_evaluation.baselines import uniform
from kvq_evaluation.baselines.vid_kv import VidKV, binary, ternary
from kvq_formats.errors import ConfigError


def test_values_by_hand() -> None:
    # A channel of four tokens, mean magnitude (1 + 4 + 0 + 3) / 4 = 2: 1 is not above 1 -> 0.
    values = torch.tensor([[[1.0], [-4], [0], [3]]])
    decoded = VidKV(layers=[0], group=4).decoded_values(0, values)
    assert decoded.flatten().tolist() == [0, -2, 0, 2]
    # Groups of three: mean 5/3, 1 is above 5/6; the fourth is a group of its own, mean 3.
    decoded = VidKV(layers=[0], group=3).decoded_values(0, values)
    third = float(torch.tensor(5 / 3).half())
    assert decoded.flatten().tolist() == [third, -third, 0, 3]


def test_keys_by_hand() -> None:
    # Channels 1 and 3 are widest, 9 and 10 wide, and two tokens are exact in any group of 2. The
    # others, (1, 3) and (4, 2), have sums 4 and 6 and differences -2 and 2: the means of their
    # magnitudes are 5 and 2, so that sums decode to 5 and 5 and differences to -2 and 2: back,
    # (5 - 2) / 2 and (5 + 2) / 2, then (5 + 2) / 2 and (5 - 2) / 2.
    keys = torch.tensor([[[1.0, 0, 3, 10], [4, 9, 2, 0]]])
    decoded = VidKV(layers=[0], group=2).decoded_keys(0, keys)
    # 2-bit steps of 3 and 10/3 in fp16; three of the latter come to 10 within three halves of an
    # fp16 step of 2**-9 at 10/3.
    expected = torch.tensor([[[1.5, 0, 3.5, 10], [3.5, 9, 1.5, 0]]])
    assert torch.allclose(decoded, expected, rtol=0, atol=1.5 * 2**-9)


def test_one_choice_of_channels_for_all_heads() -> None:
    # Channel 0 is wide in the second head only; both keep it at 2 bits.
    keys = torch.tensor([[[0.0, 0], [1, 2], [2, 4], [3, 6]], [[0, 0], [30, 1], [60, 2], [90, 3]]])
    decoded = VidKV(layers=[0], group=4).decoded_keys(0, keys)
    assert torch.equal(decoded[..., 0], keys[..., 0])
    # The other, alone in its spectrum, has one bit: means 3 and 1.5, no number is negative.
    assert torch.equal(decoded[..., 1], torch.tensor([[3.0] * 4, [1.5] * 4]))


def test_half_a_spectrum_is_what_the_whole_one_decodes_to() -> None:
    # The authors' code transforms to the whole spectrum and takes the real part on the way back.
    for channels in (31, 32):
        keys = torch.randn(2, 64, channels, generator=torch.Generator().manual_seed(0))
        parts = torch.view_as_real(torch.fft.fft(keys)).flatten(-2).mT
        whole = uniform.by_group(parts, group=32, quantize=binary).mT.unflatten(-1, (-1, 2))
        expected = torch.fft.ifft(torch.view_as_complex(whole.contiguous())).real
        found = VidKV(layers=[0], key_bits=1).decoded_keys(0, keys)
        # Scales below 8 may round to fp16 neighbours, 2**-8 apart, where f32 sums straddle a tie.
        # Were it so for all of them, the inverse transform's mean would move by no more.
        assert torch.allclose(found, expected, rtol=0, atol=2**-8)


def test_signs_and_digits() -> None:
    x = torch.tensor([-3.0, 0, 1, 4])
    assert binary(x).tolist() == [-2, 2, 2, 2]
    assert ternary(x).tolist() == [-2, 0, 0, 2]
    assert ternary(torch.zeros(3)).tolist() == binary(torch.zeros(3)).tolist() == [0, 0, 0]


def test_error_falls_with_key_bits() -> None:
    keys = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1))
    errors = [
        float((VidKV(layers=[0], key_bits=b).decoded_keys(0, keys) - keys).square().sum())
        for b in (1, 1.5, 2)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33])
@pytest.mark.parametrize("head_dim", [64, 65, 80])
@pytest.mark.parametrize("key_bits", [1, 1.5, 2])
def test_shape_and_dtype_stay(tokens: int, head_dim: int, key_bits: float) -> None:
    x = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(2))
    codec = VidKV(layers=[0], key_bits=key_bits)
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.is_contiguous()
        assert decoded.isfinite().all()


def test_effective_bits() -> None:
    # Keys: half at 2 + 32 / 32, half at 1 + 16 / 32; values 8 / 5 + 16 / 32.
    assert VidKV(layers=[0]).effective_bits(8, 128) == pytest.approx((2.25 + 2.1) / 2)
    # 49 tokens, a sink, heads of 64: groups of 32 and 16. A wide channel 8 + 4 + 4 + 4 = 20 bytes,
    # another 4 + 2 + 2 + 2 = 10, 32 of each in two heads, and 8 bytes to tell them apart; a value
    # channel ceil(48 / 5) = 10 bytes and two scales.
    keys = 8 * (2 * 32 * (20 + 10) + 8) / (128 * 48)
    values = 8 * (10 + 4) / 48
    counted = VidKV(layers=[0]).effective_bits(2, 64, tokens=49)
    assert counted == pytest.approx((48 * (keys + values) / 2 + 16) / 49)
    assert VidKV(layers=[0], recent_tokens=128).effective_bits(2, 64, tokens=129) == 16


@pytest.mark.parametrize("options", [{"key_bits": 0.9}, {"key_bits": 2.1}, {"group": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VidKV(layers=[0], **options)
