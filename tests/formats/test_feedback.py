"""Error feedback: what it minimises, what it leaves alone, and a case worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats import outliers, packing, pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.feedback import Feedback, shape_errors
from kvq_formats.parameters import KeyParameters, ValueParameters

QUARTERS = Codebook(
    entries=torch.tensor([-0.75, -0.25, 0.25, 0.75]),
    levels=torch.tensor([0, 85, 170, 255], dtype=torch.uint8),
    offset=-0.75,
    step=1.5 / 255,
)


def moment(H: int, D: int, *, seed: int = 0) -> Tensor:
    """Second moments of channels that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(H, 8 * D, D, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(H, D, D, generator=generator, dtype=torch.float64)
    return mixed.mT @ mixed


def dense(feedback: Feedback) -> Tensor:
    """``I + G`` f64 ``[H, D, D]``, in order."""
    H, D = feedback.order.shape
    whole = torch.eye(D, dtype=torch.float64).repeat(H, 1, 1)
    for i in range(D):
        whole[:, i, i + 1 :] = feedback.gain_row(i).double()
    return whole


def test_a_case_by_hand() -> None:
    """M = [[2, 1], [1, 1]] of two channels, no damping.

    The first weighs more and is rounded first. M = (I + G) S (I + G)^T gives G = 1 (the corner:
    S_2 = 1, G S_2 = 1, S_1 = 2 - 1). z = (0.4, 0.4): 0.4 rounds to 0.25, error 0.15, so that the
    target of the second is 0.55, which rounds to 0.75: errors 0.15 and -0.35 with
    2 * 0.0225 - 2 * 0.0525 + 0.1225 = 0.0625. By itself 0.4 would have rounded to 0.25 twice:
    (2 + 2 + 1) * 0.0225 = 0.1125.
    """
    feedback = Feedback.fit(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]).double(), damping=0.0)
    assert feedback.order.tolist() == [[0, 1]]
    assert feedback.gains.tolist() == [[1.0]]
    assert feedback.shift.tolist() == [[0.0, 0.0]]
    z = torch.tensor([0.4, 0.4]).reshape(1, 1, 1, 2)
    none = torch.zeros((), dtype=torch.bool)
    targets = shape_errors(z, QUARTERS, feedback, is_outlier=none)
    assert targets.flatten().tolist() == pytest.approx([0.4, 0.55], abs=2**-23)


def test_a_shift_by_hand() -> None:
    """It moves the numbers of its channel, and errors are those of what was moved.

    Errors go from the second channel to the first. 0.4 + 0.2 rounds to 0.75: error 0.6 - 0.75, so
    that the target of the first is (0.4 - 0.1) - 0.15.
    """
    feedback = Feedback(torch.tensor([[1, 0]]), torch.ones(1, 1).half(), torch.zeros(1, 2))
    feedback = feedback.shifted(torch.tensor([[-0.1, 0.2]]))
    none = torch.zeros((), dtype=torch.bool)
    z = torch.tensor([0.4, 0.4]).reshape(1, 1, 1, 2)
    targets = shape_errors(z, QUARTERS, feedback, is_outlier=none)
    assert targets.flatten().tolist() == pytest.approx([0.15, 0.6], abs=2**-23)
    # 0.9 + 0.2 is beyond the range and stored as it is, without an error.
    z = torch.tensor([0.4, 0.9]).reshape(1, 1, 1, 2)
    targets = shape_errors(z, QUARTERS, feedback, is_outlier=None)
    assert targets.flatten().tolist() == pytest.approx([0.3, 1.1], abs=2**-22)


def test_a_shift_keeps_the_mean_of_a_channel() -> None:
    """Numbers from 0.31 to 0.49 all round to 0.25. Moved by 0.06 three of ten round to 0.75."""
    rising = torch.linspace(0.31, 0.49, 10)
    z = torch.stack([rising, -rising, rising - 0.4], dim=-1)[None, None]
    still = Feedback(torch.tensor([[2, 0, 1]]), torch.zeros(1, 3).half(), torch.zeros(1, 3))
    none = torch.zeros((), dtype=torch.bool)

    def mean_error(feedback: Feedback) -> Tensor:
        targets = shape_errors(z, QUARTERS, feedback, is_outlier=none)
        return (z - QUARTERS.decode(QUARTERS.encode(targets))).mean(dim=(0, 1, 2))

    assert mean_error(still).tolist() == pytest.approx([0.15, -0.15, 0.0], abs=1e-6)
    moved = still.shifted(torch.tensor([[0.06, -0.06, 0.0]]))
    assert mean_error(moved).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_every_part_moves_and_turns_with_it() -> None:
    feedback = random_feedback(2, 5, seed=6)
    elsewhere = feedback.to("meta")
    assert {part.device.type for part in vars(elsewhere).values()} == {"meta"}
    channels = torch.tensor([3, 0, 4, 2, 1])
    turned = feedback.reordered(channels)
    assert torch.equal(turned.shift, feedback.shift[:, channels])
    # Places in the order are of the same channels as before, and gains go by places.
    assert torch.equal(channels[turned.order], feedback.order)
    assert torch.equal(turned.gains, feedback.gains)
    other = feedback.shifted(turned.shift)
    assert torch.equal(other.shift, turned.shift)
    assert torch.equal(other.order, feedback.order)
    assert torch.equal(other.gains, feedback.gains)


@pytest.mark.parametrize("D", [1, 2, 16, 80])
def test_gains_are_the_factors_of_the_moments(D: int) -> None:
    found = moment(2, D)
    feedback = Feedback.fit(found, damping=0.0)
    assert torch.equal(feedback.order.sort(-1).values, torch.arange(D).expand(2, D))
    index = feedback.order[:, :, None].expand(2, D, D)
    ordered = found.gather(1, index).gather(2, index.mT)
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    assert (diagonal[:, 1:] <= diagonal[:, :-1]).all()
    whole = dense(feedback)
    # What is left after the factors are taken out is diagonal, up to f16 gains.
    inner = torch.linalg.solve_triangular(whole, ordered, upper=True)
    inner = torch.linalg.solve_triangular(whole, inner.mT, upper=True)
    rest = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    # A gain is off by 2**-11 of itself; D of them meet in an entry, twice.
    bound = 2 * D * 2**-11 * whole.abs().max() ** 2 * diagonal.max()
    assert rest.abs().max() <= bound


def expected_loss(error: Tensor, moments: Tensor) -> float:
    """Sum of ``e^T M e`` over tokens, of errors f32 ``[P, H, T, D]``."""
    return float(torch.einsum("phtd,hde,phte->", error.double(), moments, error.double()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_lowers_the_expected_loss(bits: int) -> None:
    H, T, D = 2, 300, 32
    codebook = Codebook.fit_grid(torch.linspace(-1, 1, 1 << bits))
    z = torch.rand(1, H, T, D, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = moment(H, D)
    none = torch.zeros((), dtype=torch.bool)
    targets = shape_errors(z, codebook, Feedback.fit(found, damping=0.01), is_outlier=none)
    alone = codebook.decode(codebook.encode(z)) - z
    shaped = codebook.decode(codebook.encode(targets)) - z
    # The plain error is larger, what it costs is a fraction.
    assert shaped.square().sum() > alone.square().sum()
    assert expected_loss(shaped, found) < 0.5 * expected_loss(alone, found)


def test_a_loss_that_knows_no_neighbours_changes_nothing() -> None:
    z = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(2)) / 2
    for moments in (torch.eye(8).double().repeat(3, 1, 1), torch.zeros(3, 8, 8).double()):
        feedback = Feedback.fit(moments, damping=0.03)
        assert torch.equal(shape_errors(z, QUARTERS, feedback, is_outlier=None), z)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1]),
    seed=st.integers(0, 1000),
    fraction=st.sampled_from([0.0, 0.01]),
)
def test_codes_depend_on_their_own_token_alone(tokens: int, seed: int, fraction: float) -> None:
    H, D = 2, 16
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(H, tokens, D, generator=generator) / 3
    feedback = Feedback.fit(moment(H, D), damping=0.03)
    parameters = KeyParameters(
        torch.zeros(H, D), torch.ones(H, D), QUARTERS, outlier_step=0.01, feedback=feedback
    )
    values = ValueParameters(QUARTERS, outlier_step=0.01, feedback=feedback)
    config = KVQConfig(key_bits=2, value_bits=2, outlier_fraction=fraction, outlier_capacity=0.2)
    config = config.model_copy(update={"value_capacity_factor": 4.0})
    whole = pages.decode_keys(
        pages.encode_keys(keys, parameters, config), parameters, tokens=tokens
    )
    whole_values = pages.decode_values(
        pages.encode_values(keys, values, config), values, tokens=tokens
    )
    for token in {0, tokens // 2, tokens - 1} if tokens else set():
        one = keys[:, token : token + 1]
        alone = pages.decode_keys(pages.encode_keys(one, parameters, config), parameters, tokens=1)
        assert torch.equal(whole[:, token], alone[:, 0])
        alone = pages.decode_values(pages.encode_values(one, values, config), values, tokens=1)
        assert torch.equal(whole_values[:, token], alone[:, 0])


def test_channels_in_another_order_give_the_same_numbers() -> None:
    H, D = 2, 12
    keys = torch.randn(H, 40, D, generator=torch.Generator().manual_seed(3)) / 3
    half_range = torch.rand(H, D, generator=torch.Generator().manual_seed(4)) + 0.5
    shift = torch.randn(H, D, generator=torch.Generator().manual_seed(6)) / 4
    feedback = Feedback.fit(moment(H, D), damping=0.03).shifted(shift)
    parameters = KeyParameters(torch.zeros(H, D), half_range, QUARTERS, 0.01, feedback)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(5))
    turned = replace(
        parameters, half_range=half_range[:, order], feedback=feedback.reordered(order)
    )
    config = KVQConfig(key_bits=2, value_bits=2, outlier_capacity=0.2)
    found = pages.decode_keys(
        pages.encode_keys(keys[..., order], turned, config), turned, tokens=40
    )
    expected = pages.decode_keys(pages.encode_keys(keys, parameters, config), parameters, tokens=40)
    assert torch.equal(found, expected[..., order])


def test_an_outlier_has_no_error_to_pass_on() -> None:
    """Channel 0 lies far out: stored, it leaves the others alone; clamped, it moves them."""
    feedback = Feedback.fit(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]).double(), damping=0.0)
    z = torch.tensor([3.0, 0.1]).reshape(1, 1, 1, 2)
    assert torch.equal(shape_errors(z, QUARTERS, feedback, is_outlier=None), z)
    none = torch.zeros((), dtype=torch.bool)
    clamped = shape_errors(z, QUARTERS, feedback, is_outlier=none)
    # 3 decodes to 0.75: what is missing, 2.25, is asked of channel 1.
    assert clamped.flatten().tolist() == pytest.approx([3.0, 2.35])


# Properties


def grid(bits: int) -> Codebook:
    """Entries and decode entries at different places, as Q-Norm leaves them."""
    return Codebook.fit_grid(
        torch.linspace(-0.9, 0.9, 1 << bits), qnorm_scale=1.1, qnorm_shift=0.02
    )


def shaped_one_by_one(
    z: Tensor, codebook: Codebook, feedback: Feedback, *, is_outlier: Tensor | None
) -> Tensor:
    """As the module says it, number by number, each product and sum rounded to f32."""
    moved = z + feedback.shift[None, :, None]
    targets = moved.clone()
    for page, head, token in torch.cartesian_prod(*(torch.arange(n) for n in z.shape[:3])).tolist():
        order = feedback.order[head].tolist()
        target = targets[page, head, token]
        for i, channel in enumerate(order):
            outlier = (
                bool(target[channel].abs() > 1)
                if is_outlier is None
                else bool(is_outlier.expand_as(z)[page, head, token, channel])
            )
            code = codebook.encode(target[channel])
            stored = target[channel] if outlier else codebook.decode(code)
            error = moved[page, head, token, channel] - stored
            for gain, later in zip(feedback.gain_row(i)[head], order[i + 1 :], strict=True):
                target[later] = target[later] + gain * error
    return targets


def random_feedback(
    H: int, D: int, *, seed: int, scale: float = 1.0, shift: float = 0.2
) -> Feedback:
    """Any order, gains and shifts of these sizes, whether or not a moment gives them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(D, generator=generator) for _ in range(H)])
    gains = torch.randn(H, D * (D - 1) // 2, generator=generator) * scale
    return Feedback(order, gains.half(), torch.randn(H, D, generator=generator) * shift)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4]),
    exactly=st.sampled_from(["none", "beyond", "given"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    shift=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_every_implementation_gives_these_bits(
    seed: int, bits: int, exactly: str, scale: float, shift: float
) -> None:
    P, H, T, D = 2, 2, 3, 5
    generator = torch.Generator().manual_seed(seed)
    codebook = grid(bits)
    z = torch.randn(P, H, T, D, generator=generator)
    # Some lie on a boundary between two codes, or at the end of the range.
    below, above = (torch.nextafter(torch.ones(1), torch.tensor(to)) for to in (0.0, 2.0))
    places = torch.cat([codebook.midpoints, torch.tensor([-1.0, 1.0]), below, -above, above])
    chosen = places[torch.randint(len(places), z.shape, generator=generator)]
    z = torch.where(torch.rand(z.shape, generator=generator) < 0.3, chosen, z)
    is_outlier = {
        "none": torch.zeros((), dtype=torch.bool),
        "beyond": None,
        "given": torch.rand(z.shape, generator=generator) < 0.3,
    }[exactly]
    feedback = random_feedback(H, D, seed=seed, scale=scale, shift=shift)
    found = shape_errors(z, codebook, feedback, is_outlier=is_outlier)
    assert torch.equal(found, shaped_one_by_one(z, codebook, feedback, is_outlier=is_outlier))


@pytest.mark.parametrize("entries", [1, 100, 10_000])
def test_pages_that_are_shaped_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    z = torch.randn(5, 2, 7, 6, generator=torch.Generator().manual_seed(1))
    feedback = random_feedback(2, 6, seed=1)
    is_outlier = torch.rand(z.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    whole = [shape_errors(z, QUARTERS, feedback, is_outlier=it) for it in (None, is_outlier)]
    monkeypatch.setattr("kvq_formats.feedback.BLOCK_ENTRIES", entries)
    pieces = [shape_errors(z, QUARTERS, feedback, is_outlier=it) for it in (None, is_outlier)]
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)


def encoded(
    x: Tensor, config: KVQConfig, feedback: Feedback | None
) -> tuple[pages.KeyPages, pages.ValuePages]:
    """Pages of f32 ``[H, T, D]``, as keys and as values."""
    H, _, D = x.shape
    keys = KeyParameters(
        torch.full((H, D), 0.1), torch.full((H, D), 1.5), grid(config.key_bits), 0.01, feedback
    )
    values = ValueParameters(grid(config.value_bits), 0.01, feedback)
    return pages.encode_keys(x, keys, config), pages.encode_values(x, values, config)


@pytest.mark.parametrize("grain", ["token", "head"])
@pytest.mark.parametrize("room", [0.0, 0.05])
def test_pages_hold_the_codes_of_the_targets(room: float, grain: str) -> None:
    """What has no error is what a page has room for: of keys beyond the range, of values ranked."""
    H, T, D = 2, 9, 8
    x = torch.randn(H, T, D, generator=torch.Generator().manual_seed(3)) * 2
    config = KVQConfig.create(
        key_bits=3, value_bits=3, value_grain=grain, outlier_fraction=room, outlier_capacity=room
    )
    feedback = random_feedback(H, D, seed=4)
    key_pages, value_pages = encoded(x, config, feedback)
    codebook, none = grid(3), torch.zeros((), dtype=torch.bool)

    def codes(z: Tensor, is_outlier: Tensor | None) -> Tensor:
        return codebook.encode(shape_errors(z[None], codebook, feedback, is_outlier=is_outlier))

    found = packing.unpack_keys(key_pages.words, bits=3)[:, :, :T]
    z = (x - 0.1) / 1.5
    assert torch.equal(found, codes(z, None if room else none))
    vectors = x if grain == "head" else x.transpose(0, 1).reshape(1, T, H * D)
    per_side = outliers.value_outliers_per_side(config, H, D)
    assert (per_side > 0) == (room > 0)
    half_range, center, is_outlier = pages.value_thresholds(vectors, outliers_per_side=per_side)
    if grain == "token":
        is_outlier = is_outlier.reshape(T, H, D).transpose(0, 1)
    z = (x - center.float()) / half_range.float()
    found = packing.unpack_values(value_pages.words, bits=3)[:, :, :T]
    assert torch.equal(found, codes(z, is_outlier[None]))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4]),
    tokens=st.sampled_from([1, 9, PAGE_TOKENS + 3]),
    grain=st.sampled_from(["token", "head"]),
    fraction=st.sampled_from([0.0, 0.1]),
)
def test_gains_and_shifts_of_zero_are_plain_rounding(
    seed: int, bits: int, tokens: int, grain: str, fraction: float
) -> None:
    H, D = 2, 8
    x = torch.randn(H, tokens, D, generator=torch.Generator().manual_seed(seed)) * 2
    config = KVQConfig.create(
        key_bits=bits,
        value_bits=bits,
        value_grain=grain,
        outlier_fraction=fraction,
        outlier_capacity=fraction / 2,
    )
    nothing = random_feedback(H, D, seed=seed, scale=0.0, shift=0.0)
    for shaped, plain in zip(encoded(x, config, nothing), encoded(x, config, None), strict=True):
        for name, tensor in vars(plain).items():
            assert torch.equal(getattr(shaped, name), tensor), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    scale=st.sampled_from([0.5, 3.0, 300.0]),
)
def test_numbers_decode_to_entries_however_far_errors_push_them(
    seed: int, bits: int, size: float, scale: float
) -> None:
    """Without outliers nothing but the entries of the codebook comes back."""
    H, T, D = 2, 11, 8
    x = torch.randn(H, T, D, generator=torch.Generator().manual_seed(seed)) * size
    config = KVQConfig.create(
        key_bits=bits, value_bits=bits, outlier_fraction=0.0, outlier_capacity=0.0
    )
    feedback = random_feedback(H, D, seed=seed, scale=scale)
    key_pages, value_pages = encoded(x, config, feedback)
    entries = grid(bits).decode_entries
    keys = KeyParameters(torch.zeros(H, D), torch.ones(H, D), grid(bits), 0.01)
    assert torch.isin(pages.decode_keys(key_pages, keys, tokens=T), entries).all()
    values = ValueParameters(grid(bits), 0.01)
    decoded = pages.decode_values(value_pages, values, tokens=T)
    half_range, center = value_pages.scales[0, 0, :T].float().unbind(-1)
    every = entries * half_range[:, None] + center[:, None]
    assert (decoded[..., None] == every[None, :, None, :]).any(-1).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pages_of_gaussian_numbers_cost_less(bits: int, seed: int) -> None:
    """Gradients and numbers of channels that hang together; outliers, full pools, both grains."""
    H, T, D = 2, PAGE_TOKENS + 100, 16
    generator = torch.Generator().manual_seed(seed)

    def correlated(tokens: int) -> Tensor:
        mixing = torch.randn(H, D, D, generator=generator) / D**0.5
        return torch.randn(H, tokens, D, generator=generator) @ mixing

    x, gradients = correlated(T), correlated(2000).double()
    moments = gradients.mT @ gradients / gradients.shape[1]
    feedback = Feedback.fit(moments, damping=0.03)

    def losses(feedback: Feedback | None, config: KVQConfig) -> tuple[float, float]:
        keys = KeyParameters(torch.zeros(H, D), torch.full((H, D), 2.0), grid(bits), 0.02, feedback)
        values = ValueParameters(grid(bits), 0.02, feedback)
        found = pages.decode_keys(pages.encode_keys(x, keys, config), keys, tokens=T)
        others = pages.decode_values(pages.encode_values(x, values, config), values, tokens=T)
        key_loss, value_loss = (expected_loss((it - x)[None], moments) for it in (found, others))
        return key_loss, value_loss

    for grain in ("token", "head"):
        config = KVQConfig.create(key_bits=bits, value_bits=bits, value_grain=grain)
        for shaped, plain in zip(losses(feedback, config), losses(None, config), strict=True):
            assert shaped < 0.75 * plain


def test_rare_directions_leave_gains_that_f16_can_hold() -> None:
    """A moment of one token: all but one direction cost nothing."""
    token = torch.logspace(-6, 6, 8, dtype=torch.float64)
    one = torch.outer(token, token)[None]
    feedback = Feedback.fit(one, damping=1e-12)
    assert torch.isfinite(feedback.gains).all()
    # The steepest gain is 65504 and not infinite.
    assert feedback.gains.abs().max() == torch.finfo(torch.float16).max
