from __future__ import annotations

import pytest
import torch

from kvq_evaluation.baselines.nvfp4 import Nvfp4, round_to_e2m1
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError


def test_e2m1_by_hand() -> None:
    # Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6. A number midway goes to the even code.
    x = torch.tensor([0.2, 0.25, 0.3, 0.75, 1.25, 1.75, 2.5, 2.6, 3.5, 5.0, 5.1, 99.0, -0.75, -5.0])
    expected = [0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, -1.0, -4.0]
    assert round_to_e2m1(x).tolist() == expected


def test_nvfp4_blocks_by_hand() -> None:
    # Block 1: largest 12, scale 12/6 = 2, an e4m3 number: 12 -> 6, 5 -> 2.5 -> 2, 7 -> 3.5 -> 4,
    # 0.4 -> 0.2 -> 0. Block 2: largest 6.6, scale 1.1, between the e4m3 numbers 1 and 1.125, nearer
    # the latter (by 0.025): 6.6/1.125 = 5.87 -> 6, so 6.75; 1/1.125 = 0.89 -> 1, so 1.125.
    keys = torch.zeros(1, 1, 32)
    keys[0, 0, :4] = torch.tensor([-12.0, 5.0, 7.0, 0.4])
    keys[0, 0, 16:18] = torch.tensor([6.6, 1.0])
    expected = torch.zeros(1, 1, 32)
    expected[0, 0, :4] = torch.tensor([-12.0, 4.0, 8.0, 0.0])
    expected[0, 0, 16:18] = torch.tensor([6.75, 1.125])
    codec = Nvfp4(layers=[0])
    assert torch.equal(codec.decoded_keys(0, keys), expected)
    assert torch.equal(codec.decoded_values(0, keys), expected)


def test_mxfp4_blocks_by_hand() -> None:
    # Largest 12: floor(log2) = 3, scale 2**1: as above. Largest 8 has the same scale, codes to 12.
    # Largest 7.9: floor(log2) = 2, scale 1: 7.9 saturates at 6.
    codec = Nvfp4(layers=[0], format="mxfp4")
    for block, decoded in [
        ([-12.0, 5.0, 7.0, 0.4], [-12.0, 4.0, 8.0, 0.0]),
        ([8.0, 5.0, 7.0, 0.4], [8.0, 4.0, 8.0, 0.0]),
        ([7.9, 5.0, 7.0, 0.4], [6.0, 4.0, 6.0, 0.5]),
    ]:
        keys = torch.tensor(block).repeat(8)[None, None]
        assert codec.decoded_keys(0, keys).flatten().tolist() == decoded * 8


def test_tensor_scale_by_hand() -> None:
    # 2**-13 over 6 is 2.0e-5, below half of e4m3's smallest number 2**-9: lost with a scale of 1.
    small = torch.full((1, 1, 16), 2.0**-13)
    assert Nvfp4(layers=[5]).decoded_keys(5, small).count_nonzero() == 0
    # Samples of at most 2688 * 2**-20 give 2**-20. Then 2**-13 / 6 is 21.33 units, in [16, 32) with
    # a step of 2: 22 units. 2**7 / 22 = 5.8 -> 6: 132 units.
    keys = torch.full((3, 1, 16), 2688 * 2.0**-20)
    samples = LayerSamples(keys=9 * keys, rotated_keys=keys, values=2 * keys, queries=keys)
    codec = Nvfp4.calibrated({5: samples}, sink_tokens=2, recent_tokens=3)
    assert (codec.key_scales, codec.value_scales) == ({5: 2.0**-20}, {5: 2.0**-19})
    assert (codec.sink_tokens, codec.recent_tokens, list(codec.layers)) == (2, 3, [5])
    assert torch.equal(codec.decoded_keys(5, small), torch.full((1, 1, 16), 132 * 2.0**-20))
    # Twice the largest sample saturates the block's scale at 448: what is kept is the largest.
    assert torch.equal(codec.decoded_keys(5, 2 * keys.mT), keys.mT)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("head_dim", [15, 16, 17, 33, 64, 80])
def test_shape_and_dtype_stay(form: str, tokens: int, head_dim: int) -> None:
    x = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(0))
    codec = Nvfp4(layers=[0], format=form)
    for decoded in (codec.decoded_keys(0, x), codec.decoded_values(0, x)):
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
        assert decoded.isfinite().all()


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_powers_of_two_and_zeros_are_exact(form: str) -> None:
    codec = Nvfp4(layers=[0], format=form)
    exact = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 8).reshape(1, 1, 64)
    assert torch.equal(codec.decoded_keys(0, -4 * exact), -4 * exact)
    assert torch.equal(codec.decoded_keys(0, 0 * exact), 0 * exact)
    # The smallest f32 number is nothing in either format.
    assert codec.decoded_keys(0, torch.full((1, 1, 32), 1e-45)).count_nonzero() == 0


def test_blocks_do_not_meet() -> None:
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[1, 2, 20] *= 50
    codec = Nvfp4(layers=[0])
    same = codec.decoded_keys(0, x) == codec.decoded_keys(0, changed)
    blocks = same.unflatten(-1, (4, 16)).all(-1)
    assert blocks.sum() == 31
    assert not blocks[1, 2, 1]


def test_effective_bits() -> None:
    assert Nvfp4(layers=[0]).effective_bits(2, 64) == 4.5
    assert Nvfp4(layers=[0], format="mxfp4").effective_bits(2, 64) == 4.25
    # 80 channels are three blocks of MXFP4, 40 + 3 bytes.
    assert Nvfp4(layers=[0], format="mxfp4").effective_bits(2, 80) == 4.3
    assert Nvfp4(layers=[0]).effective_bits(2, 64, tokens=2) == 10.25


def test_another_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fp4'; expected one of nvfp4, mxfp4"):
        Nvfp4(layers=[0], format="fp4")  # type: ignore[arg-type]
