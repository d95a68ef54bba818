"""Packing on the device against the specification, byte for byte.

The specification runs on the CPU: on a GPU torch divides by a number as it multiplies with its
reciprocal, which now and then rounds to the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_formats import outliers, pages
from kvq_formats.codebook import Codebook
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_formats.errors import ConfigError
from kvq_formats.feedback import Feedback, shape_errors
from kvq_formats.pages import KeyPages, ValuePages
from kvq_formats.parameters import KeyParameters, ValueParameters
from kvq_kernels import pack
from kvq_kernels.pack import KeyPacker, ValuePacker


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is as kernels find it on a device: what is not written shows, as large magnitudes."""

    def dirty(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type != "meta":
                tensor.view(torch.uint8).fill_(0x55)
            return tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, dirty(getattr(torch, name)))


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The interpreter takes nearly as long for a small tile as for a large one."""
    if device.type == "cpu":
        monkeypatch.setattr(pack, "SCALE_TILE", 2**16)
        monkeypatch.setattr(pack, "CHANNELS", 64)
        monkeypatch.setattr(pack, "CHUNK", 2**14)
        monkeypatch.setattr(pack, "SHAPE_TOKENS", PAGE_TOKENS)


def codebook(bits: int) -> Codebook:
    """Entries without symmetry, so that no two codes can be mistaken for each other."""
    return Codebook.fit_grid(torch.linspace(-1, 1.2, 1 << bits).sinh())


def key_parameters(bits: int, H: int, D: int, *, range_factor: float = 1.0) -> KeyParameters:
    generator = torch.Generator().manual_seed(7)
    return KeyParameters(
        center=torch.randn(H, D, generator=generator) / 8,
        half_range=(torch.rand(H, D, generator=generator) + 0.5) * range_factor,
        codebook=codebook(bits),
        outlier_step=0.013,
    )


def value_parameters(bits: int) -> ValueParameters:
    return ValueParameters(codebook=codebook(bits), outlier_step=0.07)


def heavy(H: int, P: int, D: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys or values with a heavy tail."""
    generator = torch.Generator().manual_seed(3)
    shape = (H, P * PAGE_TOKENS, D)
    x = torch.randn(shape, generator=generator) / 4
    return (x * torch.where(torch.rand(shape, generator=generator) < 0.02, 6.0, 1.0)).to(dtype)


def few_numbers(H: int, P: int, D: int, numbers: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(0, len(numbers), (H, P * PAGE_TOKENS, D), generator=generator)
    return torch.tensor(numbers)[chosen]


def assert_same_bytes(found: Any, expected: Any) -> None:
    for field in fields(expected):
        got, want = getattr(found, field.name).cpu(), getattr(expected, field.name)
        assert got.dtype == want.dtype, field.name
        assert got.shape == want.shape, field.name
        if field.name == "base_positions":
            assert not got.any()
        else:
            # As bytes: a zero has a sign.
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), field.name


def check_keys(
    keys: Tensor, parameters: KeyParameters, config: KVQConfig, device: torch.device
) -> KeyPages:
    """Assert that a kernel packs ``keys`` as specified; return what was expected."""
    expected = pages.encode_keys(keys.cpu().float(), parameters, config)
    assert_same_bytes(KeyPacker(parameters, config, device=device).pack(keys), expected)
    return expected


def check_values(
    values: Tensor, parameters: ValueParameters, config: KVQConfig, device: torch.device
) -> ValuePages:
    """Assert that a kernel packs ``values`` as specified; return what was expected."""
    expected = pages.encode_values(values.cpu().float(), parameters, config)
    assert_same_bytes(ValuePacker(parameters, config, device=device).pack(values), expected)
    return expected


OUTLIERS: dict[str, dict[str, float]] = {
    "off": {"outlier_fraction": 0.0},
    "no pool": {"outlier_capacity": 0.0},
    "room": {"outlier_capacity": 0.2, "value_capacity_factor": 4},
    "overflowing": {"outlier_capacity": 0.002, "value_capacity_factor": 1},
}


def config(bits: int, amount: str, *, grain: str = "token") -> KVQConfig:
    return KVQConfig(key_bits=bits, value_bits=bits, value_grain=grain, **OUTLIERS[amount])


@pytest.mark.parametrize(
    ("bits", "H", "D", "grain", "amount", "dtype"),
    [
        (2, 1, 64, "token", "room", torch.float32),
        (2, 2, 80, "head", "overflowing", torch.bfloat16),
        (2, 1, 128, "token", "off", torch.float16),
        (3, 3, 16, "token", "overflowing", torch.bfloat16),
        (3, 2, 96, "token", "room", torch.float16),
        (3, 1, 128, "head", "overflowing", torch.float32),
        (3, 2, 6, "head", "off", torch.float32),
        (4, 2, 64, "head", "room", torch.bfloat16),
        (4, 2, 80, "token", "overflowing", torch.float32),
        (4, 1, 256, "token", "room", torch.bfloat16),
        (4, 1, 2, "token", "room", torch.float16),
        (4, 2, 16, "head", "no pool", torch.float64),
    ],
    ids=str,
)
def test_pages_are_as_specified(
    bits: int,
    H: int,
    D: int,
    grain: str,
    amount: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x = heavy(H, 1, D, dtype=dtype).to(device)
    options = config(bits, amount, grain=grain)
    check_keys(x, key_parameters(bits, H, D), options, device)
    check_values(x, value_parameters(bits), options, device)


def test_the_amounts_of_outliers_are_what_they_are_called(device: torch.device) -> None:
    used = {}
    for amount in ("room", "overflowing"):
        packed = check_keys(heavy(1, 1, 64), key_parameters(3, 1, 64), config(3, amount), device)
        used[amount] = packed.outlier_counts.sum().item(), packed.outliers.shape[-1]
    assert 0 < used["room"][0] < used["room"][1]
    assert used["overflowing"][0] == used["overflowing"][1]


@pytest.mark.parametrize(("P", "block"), [(0, 1), (3, 1), (3, 2), (3, 64)])
def test_blocks_of_pages(
    P: int, block: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    H, D = 1, 16
    monkeypatch.setattr(pack, "SCRATCH_BYTES", block * pack.CANDIDATE_BYTES * H * PAGE_TOKENS * D)
    x = heavy(H, P, D).to(device)
    check_keys(x, key_parameters(2, H, D), config(2, "overflowing"), device)
    check_values(x, value_parameters(2), config(2, "overflowing"), device)


@pytest.mark.parametrize("grain", ["token", "head"])
def test_several_tiles_a_page(
    grain: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(pack, "SCALE_TILE", 4096)
    monkeypatch.setattr(pack, "CHANNELS", 4)
    monkeypatch.setattr(pack, "CHUNK", 1024)
    x = heavy(2, 1, 10).to(device)
    check_keys(x, key_parameters(3, 2, 10), config(3, "overflowing"), device)
    check_values(x, value_parameters(3), config(3, "overflowing", grain=grain), device)


def test_strided_inputs_are_read_where_they_are(device: torch.device) -> None:
    H, D = 2, 32
    whole = heavy(2 * H, 2, 2 * D, dtype=torch.bfloat16).to(device)
    tail = whole[:H, 100 : 100 + PAGE_TOKENS, :D]
    head_last = whole[:, :PAGE_TOKENS, :D].transpose(0, 1).contiguous().transpose(0, 1)[1:3]
    every_other_channel = whole[1 : 1 + H, :PAGE_TOKENS, ::2]
    for x in (tail, head_last, every_other_channel):
        assert not x.is_contiguous()
        before = x.clone()
        check_keys(x, key_parameters(2, H, D), config(2, "room"), device)
        check_values(x, value_parameters(2), config(2, "room"), device)
        assert torch.equal(x, before)


def candidates(count: int, *, device: torch.device) -> Tensor:
    """Keys of one head of 16 channels with ``count`` candidates, two of a magnitude each time."""
    keys = torch.zeros(PAGE_TOKENS * 16)
    places = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1))[:count]
    keys[places] = 2 + torch.arange(count) // 2 / 8.0
    return keys.view(1, PAGE_TOKENS, 16).to(device)


@pytest.mark.parametrize("excess", [-48, -1, 0, 1, 2, 7])
def test_pools_that_are_full_to_the_last_place(excess: int, device: torch.device) -> None:
    options = KVQConfig(outlier_capacity=0.01, key_bits=3)
    capacity = outliers.key_pool_capacity(options, 16)
    assert capacity == 48
    parameters = KeyParameters(torch.zeros(1, 16), torch.ones(1, 16), codebook(3), 0.013)
    packed = check_keys(candidates(capacity + excess, device=device), parameters, options, device)
    assert packed.outlier_counts.sum() == min(capacity, capacity + excess)


@pytest.mark.parametrize("range_factor", [1e-3, 1e3])
def test_every_key_or_none_is_a_candidate(range_factor: float, device: torch.device) -> None:
    parameters = key_parameters(3, 1, 32, range_factor=range_factor)
    packed = check_keys(heavy(1, 1, 32).to(device), parameters, config(3, "room"), device)
    capacity = packed.outliers.shape[-1]
    assert packed.outlier_counts.sum() == (capacity if range_factor < 1 else 0)


def test_a_key_at_the_end_of_its_range_is_no_candidate(device: torch.device) -> None:
    keys = few_numbers(1, 1, 16, [1.0, -1.0, 0.25]).to(device)
    parameters = KeyParameters(torch.zeros(1, 16), torch.ones(1, 16), codebook(3), 0.013)
    packed = check_keys(keys, parameters, config(3, "room"), device)
    assert not packed.outlier_counts.any()


@pytest.mark.parametrize("full_tokens", [1, 40])
def test_a_token_keeps_at_most_255_channels(full_tokens: int, device: torch.device) -> None:
    keys = torch.zeros(1, PAGE_TOKENS, 256)
    keys[:, 7 : 7 + full_tokens] = 3.0
    keys[:, 90, :10] = 9.0
    parameters = KeyParameters(torch.zeros(1, 256), torch.ones(1, 256), codebook(4), 0.013)
    # 40 full tokens find room for 12 and a part.
    options = KVQConfig(outlier_capacity=0.05)
    packed = check_keys(keys.to(device), parameters, options, device)
    assert packed.outlier_counts[0, 0, 7] == 255
    assert packed.outlier_counts[0, 0, 90] == 10


@pytest.mark.parametrize("grain", ["token", "head"])
@pytest.mark.parametrize(
    "numbers",
    [[0.75], [0.0], [-0.0], [0.0, -0.0], [-2.0, 0.0, -0.0, 3.0], [0.0] * 9 + [-0.0] * 9 + [1.0]],
    ids=str,
)
def test_equal_values(numbers: list[float], grain: str, device: torch.device) -> None:
    values = few_numbers(2, 1, 16, numbers).to(device)
    for fraction in (0.0, 0.2):
        options = KVQConfig(
            value_bits=2,
            value_grain=grain,
            outlier_fraction=fraction,
            value_capacity_factor=1,
        )
        check_values(values, value_parameters(2), options, device)


def test_value_lists_overflow_unevenly(device: torch.device) -> None:
    """All outliers of the tokens lie in one head: its list overflows, the other's stays empty."""
    values = heavy(2, 1, 32)
    values[1] *= 40
    packed = check_values(values.to(device), value_parameters(3), config(3, "overflowing"), device)
    ends = packed.outlier_offsets.int()[0, :, -1].tolist()
    assert ends == [0, packed.outliers.shape[-1]]


def test_equal_keys_go_by_their_place(device: torch.device) -> None:
    keys = few_numbers(1, 1, 64, [0.1, 0.2, 2.0, -2.0, 3.0, 0.0]).to(device)
    parameters = KeyParameters(torch.zeros(1, 64), torch.ones(1, 64), codebook(3), 0.013)
    for capacity in (0.01, 0.17, 0.2):
        options = KVQConfig(key_bits=3, outlier_capacity=capacity)
        packed = check_keys(keys, parameters, options, device)
        assert packed.outlier_counts.sum() == packed.outliers.shape[-1]


def test_halves_are_rounded_to_even(device: torch.device) -> None:
    """Numbers on the boundaries of codes, residuals between two steps, and beyond the last."""
    grid = Codebook(
        entries=torch.tensor([-1.0, -0.5, 0.5, 1.0]),
        levels=torch.tensor([0, 64, 192, 255], dtype=torch.uint8),
        offset=-1.0,
        step=2.0 / 256,
    )
    eighths = torch.arange(-(PAGE_TOKENS * 8), PAGE_TOKENS * 8) / 8
    keys = eighths.view(1, PAGE_TOKENS, 16).to(device)
    options = KVQConfig(key_bits=2, value_bits=2, outlier_capacity=0.2, outlier_fraction=0.2)
    for step in (0.25, 0.03125):
        parameters = KeyParameters(torch.zeros(1, 16), torch.ones(1, 16), grid, step)
        check_keys(keys, parameters, options, device)
        check_values(keys, ValueParameters(grid, step), options, device)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-7, 1e5, 1e38])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_numbers_of_any_size(scale: float, device: torch.device) -> None:
    """Scales of values saturate in fp16; keys far from their range saturate as outliers."""
    x = (heavy(1, 1, 32) * scale).to(device)
    x[0, 5, :3] = torch.tensor([torch.inf, -torch.inf, 1e38])
    check_keys(x, key_parameters(4, 1, 32), config(4, "room"), device)
    tiny = key_parameters(4, 1, 32, range_factor=1e-30)
    check_keys(x, tiny, config(4, "overflowing"), device)
    check_values(x, value_parameters(4), config(4, "room", grain="head"), device)


def test_another_width_than_the_codebook_has_is_refused() -> None:
    found = "codes of 3 bits .* codebook of 4 bits"
    with pytest.raises(ConfigError, match=found) as refused:
        KeyPacker(key_parameters(4, 1, 16), config(3, "room"), device="cpu")
    assert "kvq calibrate" in (refused.value.hint or "")
    with pytest.raises(ConfigError, match=found):
        ValuePacker(value_parameters(4), config(3, "room"), device="cpu")


def some_feedback(H: int, D: int, *, seed: int = 11) -> Feedback:
    """Feedback of heads whose channels hang together, with a shift of each."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(H, 4 * D, D, generator=generator, dtype=torch.float64)
    mixed = gradients @ torch.randn(H, D, D, generator=generator, dtype=torch.float64)
    shift = torch.randn(H, D, generator=generator) / 8
    return Feedback.fit(mixed.mT @ mixed, damping=0.1).shifted(shift)


@pytest.mark.parametrize(
    ("bits", "outliers"),
    [(2, "off"), (2, "overflowing"), (3, "off"), (3, "room"), (4, "room"), (4, "overflowing")],
)
def test_feedback(bits: int, outliers: str, device: torch.device) -> None:
    H, D = 2, 20
    config = KVQConfig(key_bits=bits, value_bits=bits, **OUTLIERS[outliers])
    keys, values = heavy(H, 2, D), heavy(H, 2, D).flip(1)
    shaped = replace(key_parameters(bits, H, D), feedback=some_feedback(H, D))
    expected = check_keys(keys.to(device), shaped, config, device)
    plain = pages.encode_keys(keys, key_parameters(bits, H, D), config)
    assert not torch.equal(expected.words, plain.words)
    shaped_values = replace(value_parameters(bits), feedback=some_feedback(H, D))
    check_values(values.to(device), shaped_values, config, device)


@pytest.mark.parametrize(
    ("bits", "H", "P", "D", "amount", "dtype", "what"),
    [
        (2, 2, 1, 64, "overflowing", torch.bfloat16, "both"),
        (3, 1, 2, 64, "room", torch.float32, "keys"),
        (4, 2, 1, 64, "off", torch.float16, "values"),
        (2, 1, 1, 80, "room", torch.float32, "both"),
        (3, 2, 1, 80, "overflowing", torch.float16, "values"),
        (4, 2, 1, 80, "room", torch.bfloat16, "keys"),
        (4, 1, 1, 80, "off", torch.float32, "both"),
        (3, 1, 1, 96, "no pool", torch.bfloat16, "both"),
        (2, 1, 2, 128, "off", torch.bfloat16, "keys"),
        (3, 1, 1, 128, "overflowing", torch.bfloat16, "both"),
        (4, 2, 1, 128, "room", torch.float32, "values"),
        (2, 1, 1, 256, "overflowing", torch.float16, "keys"),
        (2, 1, 1, 256, "room", torch.bfloat16, "values"),
        (4, 2, 1, 2, "room", torch.float32, "both"),
        (3, 3, 2, 8, "overflowing", torch.bfloat16, "both"),
        (2, 2, 1, 10, "room", torch.float64, "both"),
    ],
    ids=str,
)
def test_feedback_of_any_shape(
    bits: int,
    H: int,
    P: int,
    D: int,
    amount: str,
    dtype: torch.dtype,
    what: str,
    device: torch.device,
) -> None:
    x, options = heavy(H, P, D, dtype=dtype).to(device), config(bits, amount)
    feedback = some_feedback(H, D)
    if what != "values":
        check_keys(x, replace(key_parameters(bits, H, D), feedback=feedback), options, device)
    if what != "keys":
        check_values(x, replace(value_parameters(bits), feedback=feedback), options, device)


@pytest.mark.parametrize(("tokens", "amount"), [(64, "overflowing"), (128, "off")])
def test_feedback_with_several_programs_a_page_and_blocks_of_pages(
    tokens: int, amount: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    H, D = 1, 12
    monkeypatch.setattr(pack, "SHAPE_TOKENS", tokens)
    monkeypatch.setattr(pack, "SCRATCH_BYTES", 2 * pack.CANDIDATE_BYTES * H * PAGE_TOKENS * D)
    x, feedback = heavy(2 * H, 3, 2 * D).to(device)[1:, :, :D], some_feedback(H, D)
    assert not x.is_contiguous()
    keys = replace(key_parameters(3, H, D), feedback=feedback)
    check_keys(x, keys, config(3, amount), device)
    check_values(x, replace(value_parameters(3), feedback=feedback), config(3, amount), device)


@pytest.mark.parametrize("size", ["any", "zeros", "large"])
def test_targets_of_feedback_are_the_specifications_bits(size: str, device: torch.device) -> None:
    """Codes and outliers alone would hide most of a target's bits."""
    H, P, D = 2, 1, 20
    keys = {
        "any": heavy(H, P, D),
        "zeros": few_numbers(H, P, D, [0.0, -0.0, 0.0, -0.0, 0.5]),
        "large": heavy(H, P, D) * 1e30,
    }[size]
    feedback, codes = some_feedback(H, D), codebook(3)
    gains = feedback.gains.where(torch.arange(feedback.gains.shape[1]) % 3 > 0, 0.0)
    feedback = replace(feedback, gains=gains)
    center, half_range = torch.zeros(H, D, device=device), torch.ones(H, D, device=device)
    tables = pack.PackTables(codes, feedback, bits=3, device=device)
    room = tables.room(P, H, D, magnitudes=None, device=device)
    found = tables.shape(keys.to(device), P, room, of_keys=(center, half_range), has_outliers=False)
    z = keys.unflatten(1, (P, PAGE_TOKENS)).transpose(0, 1)
    expected = shape_errors(z, codes, feedback, is_outlier=torch.zeros((), dtype=torch.bool))
    assert found is not None
    found = found.cpu().view(P, H, D, PAGE_TOKENS).mT.contiguous()
    assert torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize("amount", ["off", "no pool", "room"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("grain", ["token", "head"])
def test_scratch_is_counted(
    amount: str, feedback: bool, grain: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    H, P, D = 2, 2, 6
    options = config(3, amount, grain=grain).model_copy(update={"feedback": feedback})
    passed_on = some_feedback(H, D) if feedback else None
    made = []

    def noted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            made.append(0 if tensor.device.type == "meta" else tensor.nbytes)
            return tensor

        return note

    x = heavy(H, P, D).to(device)
    keys = KeyPacker(replace(key_parameters(3, H, D), feedback=passed_on), options, device=device)
    values = ValuePacker(replace(value_parameters(3), feedback=passed_on), options, device=device)
    with monkeypatch.context() as noting:
        for name in ("empty", "empty_like"):
            noting.setattr(torch, name, noted(getattr(torch, name)))
        values.pack(x)
        used = sum(made)
        made.clear()
        packed = keys.pack(x)
    key_bytes = sum(getattr(packed, field.name).nbytes for field in fields(packed))
    counted = pack.scratch_bytes(options, num_pages=P, num_kv_heads=H, head_dim=D)
    assert counted == used + key_bytes
    assert counted >= sum(made)


def test_feedback_of_heads_with_scales_of_their_own(device: torch.device) -> None:
    config = KVQConfig(key_bits=2, value_bits=2, value_grain="head")
    parameters = replace(value_parameters(2), feedback=some_feedback(3, 64))
    values = heavy(3, 1, 64, dtype=torch.bfloat16).to(device)
    check_values(values, parameters, config, device)
