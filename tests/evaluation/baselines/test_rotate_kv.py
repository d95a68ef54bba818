from __future__ import annotations

from typing import Any

import pytest
import torch

from kvq_evaluation.baselines.rotate_kv import RotateKV, rotated_heads, round_trip
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError, UnsupportedModelError


def samples(keys: torch.Tensor) -> LayerSamples:
    # Only keys before RoPE count; NaN elsewhere would show.
    unread = torch.full_like(keys, float("nan"))
    return LayerSamples(keys=keys, rotated_keys=unread, values=unread, queries=unread)


def test_a_group_by_hand() -> None:
    # Ends -2 and 4, halved -1 and 2: a step of 1 and the zero at code 1. -2 and 4 are clamped.
    group = torch.tensor([[-2.0, -1.0, 1.0, 4.0]])
    expected = torch.tensor([[-1.0, -1.0, 1.0, 2.0]])
    assert torch.equal(round_trip(group, bits=2, clip_ratio=0.5), expected)
    # Ends as they are: a step of 2, the zero at code 1; -1/2 and 1/2 round to the even 0.
    expected = torch.tensor([[-2.0, 0.0, 0.0, 4.0]])
    assert torch.equal(round_trip(group, bits=2, clip_ratio=1.0), expected)


def test_four_heads_are_rotated_together() -> None:
    # Eight ones meet in the first channel: 8 / sqrt(8).
    expected = torch.zeros(8)
    expected[0] = 8**0.5
    assert torch.allclose(rotated_heads(torch.ones(1, 4, 2)).flatten(), expected, atol=1e-6)
    # Of six heads only two go together, of three none: 4 / sqrt(4) and 2 / sqrt(2).
    six = rotated_heads(torch.ones(1, 6, 2)).reshape(3, 4)
    assert torch.allclose(six, torch.tensor([2.0, 0.0, 0.0, 0.0]).expand(3, 4))
    three = rotated_heads(torch.ones(1, 3, 2))[0]
    assert torch.allclose(three, torch.tensor([2**0.5, 0.0]).expand(3, 2))


def test_channels_are_sorted_by_their_sums_after_the_rotation() -> None:
    # (3, 1) and (0, 2) rotate to (4, 2) / sqrt(2) and (2, -2) / sqrt(2): sums of 6 and 0.
    codec = RotateKV.calibrated({4: samples(torch.tensor([[[3.0, 1.0]], [[0.0, 2.0]]]))})
    assert codec.channel_orders[4].tolist() == [1, 0]
    assert list(codec.layers) == [4]


def test_a_key_by_hand() -> None:
    # Rotated as above to (4, 2) / sqrt(2), in order (2, 4) / sqrt(2). One bit: the scale is
    # 2 / sqrt(2), the zero -1, and codes 0 and 1 hold both.
    codec = RotateKV(1, {0: torch.tensor([1, 0])}, clip_ratio=1.0)
    decoded = codec.decoded_keys(0, torch.tensor([[[3.0, 1.0]]]))
    # fp16 moves the scale by 2**-11 of itself.
    assert torch.allclose(decoded, torch.tensor([[[3.0, 1.0]]]), rtol=2.0**-10)


def test_round_trip_error_is_that_of_the_rotated_codes() -> None:
    keys = torch.randn(50, 4, 16, generator=torch.Generator().manual_seed(0))
    codec = RotateKV.calibrated({0: samples(keys)}, bits=4)
    rows = keys.transpose(0, 1)
    rotated = rotated_heads(keys).flatten(1)
    widest_step = (rotated.amax(-1) - rotated.amin(-1)) / 15
    error = (codec.decoded_keys(0, rows) - rows).transpose(0, 1).flatten(1).norm(dim=-1)
    # The zero is rounded to a code, so that an end is clamped by half a step and rounded by half:
    # at most one step in each of 64 directions, fp16 scales included.
    assert (error <= widest_step * 8 * 1.02).all()
    assert (error > 0).all()


def test_sorting_groups_channels_of_like_offset() -> None:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.where(torch.arange(16) % 2 == 0, 10.0, -10.0)
    rotated = torch.randn(100, 2, 8, generator=generator) + offsets.reshape(2, 8)
    keys = rotated_heads(rotated)
    in_order = RotateKV.calibrated({0: samples(keys)}, bits=3)
    as_they_are = RotateKV(3, {0: torch.arange(16)})
    rows = keys.transpose(0, 1)
    errors = [(c.decoded_keys(0, rows) - rows).square().mean() for c in (in_order, as_they_are)]
    assert errors[0] < errors[1]


def test_the_published_clipping() -> None:
    vectors = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))
    for bits, ratio, other in ((2, 0.8, 1.0), (3, 1.0, 0.8), (4, 1.0, 0.8)):
        decoded, same, different = (
            RotateKV(bits, {}, clip_ratio=clip_ratio).decoded_values(0, vectors)
            for clip_ratio in (None, ratio, other)
        )
        assert torch.equal(decoded, same)
        assert not torch.equal(decoded, different)


def test_error_falls_with_bits() -> None:
    values = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(3))
    errors = [(RotateKV(bits, {}).decoded_values(0, values) - values).norm() for bits in (2, 3, 4)]
    assert errors[0] > errors[1] > errors[2]


def test_tokens_do_not_meet() -> None:
    keys = torch.randn(10, 4, 16, generator=torch.Generator().manual_seed(4))
    codec = RotateKV.calibrated({0: samples(keys)})
    before = codec.decoded_keys(0, keys.transpose(0, 1))
    keys[7] *= 100
    after = codec.decoded_keys(0, keys.transpose(0, 1))
    same = torch.arange(10) != 7
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, 7], after[:, 7])


@pytest.mark.parametrize("group", [8, 15, 16, 17])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_shapes(tokens: int, group: int) -> None:
    codec = RotateKV.calibrated({0: samples(torch.ones(5, 2, 16))}, group=group)
    for decode in (codec.decoded_keys, codec.decoded_values):
        decoded = decode(0, torch.zeros(2, tokens, 16))
        assert decoded.shape == (2, tokens, 16)
        assert decoded.dtype == torch.float32
        assert decoded.eq(0).all()


def test_effective_bits() -> None:
    codec = RotateKV(2, {})
    # 128 codes of 2 bits take 32 bytes, scale and zero 4; one group of 64 takes 16 + 4.
    assert codec.effective_bits(8, 128) == 2.25
    assert codec.effective_bits(8, 64) == 2.5
    assert codec.effective_bits(8, 128, tokens=100) == pytest.approx(0.99 * 2.25 + 0.16)


@pytest.mark.parametrize("options", [{"bits": 0}, {"group": 0}, {"clip_ratio": 0.0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RotateKV.calibrated({}, **options)


def test_other_head_dims_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="power of two"):
        RotateKV.calibrated({0: samples(torch.ones(3, 4, 96))})
