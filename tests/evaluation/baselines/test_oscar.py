from __future__ import annotations

from typing import Any

import pytest
import torch

from kvq_evaluation.baselines.oscar import Oscar, clipped, rotation, targets
from kvq_evaluation.samples import LayerSamples
from kvq_formats.errors import ConfigError, UnsupportedModelError


def random_samples(T: int, H: int, HQ: int, D: int) -> LayerSamples:
    generator = torch.Generator().manual_seed(0)
    keys, rotated, values = (torch.randn(T, H, D, generator=generator) for _ in range(3))
    queries = torch.randn(T, HQ, D, generator=generator)
    return LayerSamples(keys=keys, rotated_keys=rotated, values=values, queries=queries)


def test_targets_by_hand() -> None:
    # Two query heads read one head: Q^T Q / 4 = diag(2, 1) / 4.
    queries = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    # k Q^T Q k^T: 4 * 0.5 = 2 and 4 * 0.25 = 1; over their mean 1.5, weights 4/3 and 2/3.
    keys = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    # (9 * 4/3, 9 * 2/3) / 2 tokens = (6, 3).
    values = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]])
    layer = LayerSamples(keys=keys * 0, rotated_keys=keys, values=values, queries=queries)
    of_keys, of_values = targets(layer)
    assert torch.allclose(of_keys[0], torch.tensor([0.5, 0.25]).diag().double())
    assert torch.allclose(of_values[0], torch.tensor([6.0, 3.0]).diag().double())


def test_query_heads_go_to_the_key_head_that_they_read() -> None:
    queries = torch.zeros(3, 4, 2)
    queries[:, :2, 0] = 1
    queries[:, 2:, 1] = 1
    ones = torch.ones(3, 2, 2)
    layer = LayerSamples(keys=ones, rotated_keys=ones, values=ones, queries=queries)
    expected = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    assert torch.equal(targets(layer)[0], expected.double())


def test_rotation_by_hand() -> None:
    # Eigenvectors are the axes, but for signs of rows. Two bits reversed: 0, 2, 1, 3; from the
    # largest, column 3, down: Hadamard's columns 3, 1, 2, 0, the last one being all ones.
    turn = rotation(torch.tensor([1.0, 2.0, 3.0, 4.0]).diag().double()[None])[0]
    expected = torch.tensor([[1, 1, 1, 1], [-1, -1, 1, 1], [-1, 1, -1, 1], [1, -1, -1, 1]]) / 2
    assert torch.allclose(turn * turn[:, -1:].sign(), expected)


def test_rotations_are_orthogonal() -> None:
    layer = random_samples(T=40, H=2, HQ=4, D=64)
    for per_head, heads in ((False, 1), (True, 2)):
        codec = Oscar.calibrated({3: layer}, per_head=per_head)
        for turn in (codec.key_rotations[3].double(), codec.value_rotations[3].double()):
            assert turn.shape == (heads, 64, 64)
            # 64 products of f32 entries of at most 1, rounded to 2**-24 each.
            assert (turn @ turn.mT - torch.eye(64)).abs().max() < 64 * 2.0**-23
        assert list(codec.layers) == [3]


def test_clipping_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0, 3.0, -10.0]])
    # int(0.5 * 4) = 2: of the magnitudes 1, 2, 3, 10 the one at place 2.
    assert torch.equal(clipped(rows, 0.5), torch.tensor([[1.0, -2.0, 3.0, -3.0]]))
    assert torch.equal(clipped(rows, 1.0), rows)


def test_a_vector_by_hand() -> None:
    turns = {0: torch.eye(4)[None]}
    codec = Oscar(2, turns, turns, key_clip=1.0, value_clip=0.5)
    vectors = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 30.0]]])
    # A step of 1, and of 10.
    expected = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 30.0]]])
    assert torch.equal(codec.decoded_keys(0, vectors), expected)
    # Held to 2, a step of 2/3, which fp16 moves by 2**-12 at most, times three: 1 is nearest to two
    # steps, since fp16's 0.6665 is below 2/3.
    held = torch.tensor([[[0.0, 4 / 3, 2.0, 2.0]] * 2])
    assert torch.allclose(codec.decoded_values(0, vectors), held, atol=3 * 2.0**-12, rtol=0)


@pytest.mark.parametrize("per_head", [False, True])
def test_round_trip_error_is_that_of_the_rotated_codes(per_head: bool) -> None:
    layer = random_samples(T=50, H=2, HQ=2, D=64)
    codec = Oscar.calibrated({0: layer}, bits=4, per_head=per_head, key_clip=1.0)
    keys = layer.rotated_keys.transpose(0, 1)
    rotated = keys @ codec.key_rotations[0]
    step = (rotated.amax(-1) - rotated.amin(-1)) / 15
    # A rotation keeps lengths: at most half a step in each of 64 directions, fp16 ends included.
    error = (codec.decoded_keys(0, keys) - keys).norm(dim=-1)
    assert (error <= step / 2 * 8 * 1.02).all()
    assert (error > 0).all()


def test_error_falls_with_bits() -> None:
    layer = random_samples(T=50, H=2, HQ=2, D=64)
    values = layer.values.transpose(0, 1)
    errors = [
        (Oscar.calibrated({0: layer}, bits=bits).decoded_values(0, values) - values).norm()
        for bits in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_shapes(tokens: int) -> None:
    codec = Oscar.calibrated({0: random_samples(T=9, H=2, HQ=4, D=16)}, group=8)
    for decode in (codec.decoded_keys, codec.decoded_values):
        decoded = decode(0, torch.zeros(2, tokens, 16))
        assert decoded.shape == (2, tokens, 16)
        assert decoded.dtype == torch.float32
        assert decoded.eq(0).all()


def test_effective_bits() -> None:
    def bits(head_dim: int, **windows: Any) -> float:
        tokens = windows.pop("tokens", None)
        return Oscar(2, {}, {}, **windows).effective_bits(8, head_dim, tokens=tokens)

    # 128 codes of 2 bits take 32 bytes, scale and zero 4: 288 bits for 128 numbers.
    assert bits(128) == 2.25
    assert bits(256) == 2.25
    # One group of 64: 16 + 4 bytes.
    assert bits(64) == 2.5
    # 2.25 + 13.75 * 320 / 131072: the paper's 2.28.
    published = bits(128, sink_tokens=64, recent_tokens=256, tokens=131_072)
    assert published == pytest.approx(2.2835693)


@pytest.mark.parametrize(
    "options", [{"key_clip": 0.0}, {"value_clip": 1.5}, {"group": 0}, {"bits": 9}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Oscar.calibrated({}, **options)


def test_other_head_dims_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="found 96"):
        Oscar.calibrated({0: random_samples(T=4, H=1, HQ=1, D=96)})
