"""What is learned of a rotation is what the model does; what cannot be learned is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from kvq_formats.errors import UnsupportedModelError
from kvq_kernels.rotary import rotate
from kvq_runtime.rope import AttentionTap, RotaryCall, tap_attention
from kvq_runtime.rotary_layout import LayerRotary, learn_rotary
from tiny_models import make_tiny_family

U = 2.0**-24
"""Unit roundoff of f32."""

FULL_AND_SLIDING: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


def scaled(rope_type: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **options}}


LONGROPE = {
    **scaled(
        "longrope",
        factor=4.0,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.5, 2.0, 3.0, 4.0],
        original_max_position_embeddings=128,
        partial_rotary_factor=0.5,
    ),
    # Phi-3's configuration takes it from here.
    "original_max_position_embeddings": 128,
}
DYNAMIC = {**scaled("dynamic", factor=4.0), "max_position_embeddings": 128}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-yarn": (
        "llama",
        scaled("yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "llama-llama3": (
        "llama",
        scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    "llama-linear": ("llama", scaled("linear", factor=4.0)),
    "llama-dynamic": ("llama", DYNAMIC),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", FULL_AND_SLIDING),
    "gemma3_text": (
        "gemma3_text",
        {
            **FULL_AND_SLIDING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", scaled("default", partial_rotary_factor=0.75)),
    "phi3-longrope": ("phi3", LONGROPE),
    "gpt_oss": ("gpt_oss", {**FULL_AND_SLIDING, "num_local_experts": 4}),
    "cohere": ("cohere", {}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "helium": ("helium", {"head_dim": 16}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "gpt_neox": ("gpt_neox", scaled("default", partial_rotary_factor=0.5)),
    "starcoder2": ("starcoder2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1]}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
}

INTERLEAVED = {"cohere", "glm", "glm4", "helium", "ernie4_5"}
ROTARY_DIMS = {"phi3-partial": 12, "phi3-longrope": 8, "glm": 8, "glm4": 8, "gpt_neox": 8}


def make(family: str) -> PreTrainedModel:
    model_type, options = FAMILIES[family]
    return make_tiny_family(model_type, **options)


def expected_order(family: str) -> list[int]:
    """As the families' papers and code have it."""
    R = ROTARY_DIMS.get(family, 16)
    if family not in INTERLEAVED:
        return list(range(16))
    return [*range(0, R, 2), *range(1, R, 2), *range(R, 16)]


def frequencies_of(model: PreTrainedModel, family: str) -> tuple[Tensor, float]:
    """f64 frequencies and scaling of the full layers, as the model holds them now."""
    prefix = "full_attention_" if family == "gemma3_text" else ""
    module = model.base_model.rotary_emb
    frequencies = module.get_buffer(f"{prefix}inv_freq").double()
    return frequencies, getattr(module, f"{prefix}attention_scaling")


class Recorder(AttentionTap):
    """Keys before and after the model's own rotation, and what ``learned`` says at that time."""

    def __init__(self, learned: dict[int, LayerRotary], positions: Tensor) -> None:
        self.learned = learned
        self.positions = positions
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        rotated = call.rotate(call.query, call.key)
        if (rotary := self.learned.get(call.layer_idx)) is not None:
            cos, sin = rotary.angles().cos_sin(self.positions)
            for before, after in zip((call.query, call.key), rotated, strict=True):
                before, after = before[..., rotary.order], after[..., rotary.order]
                self.seen.append((before, after, rotate(before, cos, sin)))
        return rotated


@torch.no_grad()
def rotations(model: PreTrainedModel, start: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(before, rotated by the model, rotated by kvq) of 24 positions, in rotary channel order."""
    learned = dict(learn_rotary(model))
    ids = torch.randint(3, 199, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24) + start
    recorder = Recorder(learned, positions)
    with tap_attention(model, recorder):
        model.base_model(ids, position_ids=positions[None], use_cache=False)
    assert len(recorder.seen) == 2 * len(learned)
    return recorder.seen


def pair_lengths(x: Tensor, R: int) -> Tensor:
    """Length of the pair that each channel belongs to; 0 where a channel is not rotated."""
    length = x[..., : R // 2].double().hypot(x[..., R // 2 : R].double())
    return torch.cat([length, length, torch.zeros_like(x[..., R:].double())], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_is_that_of_the_family(family: str) -> None:
    model = make(family)
    learned = learn_rotary(model)
    assert set(learned) == ({1} if "sliding_window" in FAMILIES[family][1] else {0, 1})
    for rotary in learned.values():
        assert rotary.order.dtype == torch.int64
        assert rotary.order.tolist() == expected_order(family)
        assert rotary.rotary_dim == ROTARY_DIMS.get(family, 16)
        frequencies, scaling = frequencies_of(model, family)
        assert torch.equal(rotary.angles().frequencies, frequencies)
        assert rotary.angles().scaling == scaling


@pytest.mark.parametrize("start", [0, 90, 300])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_is_the_models_own_at_small_positions(family: str, start: int) -> None:
    model = make(family)
    for before, own, ours in rotations(model, start):
        frequencies, scaling = frequencies_of(model, family)
        R = 2 * len(frequencies)
        turns = (torch.arange(24) + start)[:, None] * frequencies
        slack = torch.cat([turns, turns, turns.new_zeros(24, 16 - R)], dim=-1)
        # The model's f32 angle is off by its rounding. 10 more roundings: cosine, sine and their
        # scaling (3 sqrt(2)), products and sum (2) of the model, 3 of ours.
        bound = (slack + 10) * U * scaling * pair_lengths(before, R)
        assert bool(((ours.double() - own.double()).abs() <= bound).all())


@pytest.mark.parametrize("start", [1_000_003, 9_999_971])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_is_exact_where_the_models_own_is_not(family: str, start: int) -> None:
    model = make(family)
    for before, own, ours in rotations(model, start):
        frequencies, scaling = frequencies_of(model, family)
        half = len(frequencies)
        turns = (torch.arange(24) + start)[:, None] * frequencies
        x = before.double()
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
        exact = pairs * torch.polar(torch.full_like(turns, scaling), turns)
        exact = torch.cat([exact.real, exact.imag, x[..., 2 * half :]], dim=-1)
        # Cosine and sine 1.1 each, products and sum 2: far below 2**-20 of the length.
        lengths = pair_lengths(before, 2 * half)
        bound = (1.1 * 2**0.5 + 2.01) * U * scaling * lengths
        assert bool(((ours.double() - exact).abs() <= bound).all())
        # An f32 angle near 10 M * 0.1 is off by up to 2**-5, near 1 M * 0.1 by 2**-8.
        assert ((own.double() - exact).abs() / lengths.clamp(min=1e-3)).max() > 2.0**-12


def test_layers_of_one_rotary_module_share_its_angles() -> None:
    learned = learn_rotary(make("llama"))
    assert learned[0].angles() is learned[1].angles()


def test_angles_are_kept_while_frequencies_stay() -> None:
    model = make("llama")
    angles = learn_rotary(model)[0].angles
    first = angles()
    model(torch.tensor([[5, 6, 7]]))
    assert angles() is first
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.5)
    assert angles() is not first
    assert torch.equal(angles().frequencies, first.frequencies * 0.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_angles_follow_frequencies_that_a_forward_changes(
    family: str, mode: Callable[[], Any]
) -> None:
    model = make(family)
    angles = learn_rotary(model)[0].angles
    short = angles()
    ids = torch.tensor([[5, 6, 7]])
    with mode():
        model(ids, position_ids=torch.tensor([[0, 1, 400]]))
        long = angles()
        model(ids, position_ids=torch.tensor([[0, 1, 400]]))
        assert angles() is long
        assert torch.equal(long.frequencies, frequencies_of(model, family)[0])
        assert not torch.equal(long.frequencies, short.frequencies)
        model(ids, position_ids=torch.tensor([[0, 1, 2]]))
        assert torch.equal(angles().frequencies, short.frequencies)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in (*module.__dict__.items(), *module._buffers.items())
        if not isinstance(value, dict)
    }


@pytest.mark.parametrize("past", [None, 4, 400])
@pytest.mark.parametrize("family", ["llama", "llama-dynamic", "phi3-longrope", "gemma3_text"])
@torch.no_grad()
def test_learning_leaves_no_trace(family: str, past: int | None) -> None:
    model = make(family)
    if past is not None:
        # A dynamic type has grown its frequencies at 400, and a probe at position 1 resets them.
        model(torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, past]]))
    before = state_of(model)
    values = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    called: list[nn.Module] = []
    handle = model.base_model.rotary_emb.register_forward_hook(
        lambda module, _args, _output: called.append(module)
    )
    random_state = torch.get_rng_state()
    learned = learn_rotary(model)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not called
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] is value, name
    for name, value in values.items():
        assert torch.equal(after[name], value), name
    for rotary in learned.values():
        assert torch.equal(rotary.angles().frequencies, frequencies_of(model, family)[0])


@pytest.fixture
def half_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-yarn", "gpt_oss", "glm4"])
@pytest.mark.usefixtures("half_default")
def test_models_in_half_precision_are_learned_in_f32(family: str, dtype: torch.dtype) -> None:
    model = make(family).to(dtype)
    learned = learn_rotary(model)[1]
    assert learned.order.tolist() == expected_order(family)
    assert torch.equal(learned.angles().frequencies, frequencies_of(model, family)[0])


# Rotations that were tampered with.

Rotation = Callable[..., tuple[Tensor, Tensor]]
STOCK: Rotation = modeling_llama.apply_rotary_pos_emb


def norm(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rms_norm(x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def first_channel_doubled(x: Tensor) -> Tensor:
    return torch.cat([2 * x[..., :1], x[..., 1:]], dim=-1)


def both(change: Callable[[Tensor], Tensor]) -> Rotation:
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = STOCK(q, k, cos, sin)
        return change(q), change(k)

    return rotation


TAMPERED: dict[str, Rotation] = {
    "scaled": both(lambda x: 1.0001 * x),
    "negated": both(lambda x: -x),
    "one channel scaled": both(first_channel_doubled),
    "norm after": both(norm),
    "RMS norm after": both(rms_norm),
    "clamped": both(lambda x: x.clamp(-2, 2)),
    "large numbers scaled a little": both(lambda x: torch.where(x.abs() > 2, 1.00001 * x, x)),
    "biased": both(lambda x: x + 1e-4),
    "keys and queries swapped": lambda q, k, cos, sin: STOCK(k, q, cos, sin),
    "keys not rotated": lambda q, k, cos, sin: (STOCK(q, k, cos, sin)[0], k),
    "queries scaled": lambda q, k, cos, sin: (2 * STOCK(q, k, cos, sin)[0], k),
    "nothing rotated": lambda q, k, cos, sin: (q, k),
    "channels swapped": both(lambda x: x.roll(1, dims=-1)),
    "reflected": both(lambda x: torch.cat([-x[..., :8], x[..., 8:]], dim=-1)),
    "cosine squared": lambda q, k, cos, sin: STOCK(q, k, cos * cos, sin),
    "twice the angle": lambda q, k, cos, sin: STOCK(*STOCK(q, k, cos, sin), cos, sin),
    "keys cut off": lambda q, k, cos, sin: (q, k[..., :8]),
    "angles of a token mixed": lambda q, k, cos, sin: STOCK(q, k, cos.flip(1), sin.flip(1)),
    "other arguments": lambda x, cos, sin, unsqueeze_dim=1: (x, x),
    "more arguments": lambda q, k, cos, sin, position_ids: STOCK(q, k, cos, sin),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_function_that_does_something_else_is_refused(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", TAMPERED[what])
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM rotates its keys") as caught:
        learn_rotary(make("llama"))
    assert caught.value.hint


def test_rotation_in_the_other_direction_is_learned_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin: STOCK(q, k, cos, -sin),
    )
    model = make("llama")
    assert learn_rotary(model)[0].order.tolist() == [*range(8, 16), *range(8)]
    for before, own, ours in rotations(model, 20):
        bound = (44 + 10) * U * pair_lengths(before, 16)
        assert bool(((ours.double() - own.double()).abs() <= bound).all())


def test_a_file_without_a_rotary_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_llama, "apply_rotary_pos_emb")
    with pytest.raises(UnsupportedModelError, match="has no apply_rotary_pos_emb"):
        learn_rotary(make("llama"))


def _no_module(model: PreTrainedModel) -> None:
    del model.model.rotary_emb


def _two_modules(model: PreTrainedModel) -> None:
    model.model.another_emb = type(model.model.rotary_emb)(model.config)


def _two_times_the_position(model: PreTrainedModel) -> None:
    module = model.model.rotary_emb
    forward = module.forward
    module.forward = lambda x, position_ids: forward(x, 2 * position_ids)


def _position_beyond_ten_differs(model: PreTrainedModel) -> None:
    module = model.model.rotary_emb
    forward = module.forward
    module.forward = lambda x, position_ids: forward(x, position_ids.clamp(max=10))


def _one_tensor(model: PreTrainedModel) -> None:
    module = model.model.rotary_emb
    forward = module.forward
    module.forward = lambda x, position_ids: torch.complex(*forward(x, position_ids))


def _more_arguments(model: PreTrainedModel) -> None:
    model.model.rotary_emb.forward = lambda x, position_ids, grid: (x, x)


def _more_frequencies_than_pairs(model: PreTrainedModel) -> None:
    module = model.model.rotary_emb
    module.inv_freq = nn.Buffer(torch.linspace(0.1, 1.0, 9), persistent=False)
    forward = type(module).forward
    module.forward = lambda x, position_ids: tuple(
        part[..., [*range(8), *range(9, 17)]] for part in forward(module, x, position_ids)
    )


def _frequencies_too_close(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq[1] = 1.0 - 2.0**-23


def _no_attention(model: PreTrainedModel) -> None:
    del model.model.layers[1]


BROKEN: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "no module": (_no_module, "no module with a buffer 'inv_freq' was found"),
    "two modules": (_two_modules, "model has 2 modules with a buffer 'inv_freq'"),
    "another position": (_two_times_the_position, "at position 1"),
    "a limit": (_position_beyond_ten_differs, "not the rotation by position times"),
    "one tensor": (_one_tensor, "returns tensors of shapes"),
    "more arguments": (_more_arguments, "fails on positions alone"),
    "frequencies left over": (_more_frequencies_than_pairs, "rotated by 9 frequencies"),
    "close frequencies": (_frequencies_too_close, "too close to be told apart"),
    "no attention": (_no_attention, "layer 1 has no attention"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_module_that_does_something_else_is_refused(what: str) -> None:
    damage, message = BROKEN[what]
    model = make("llama")
    damage(model)
    with pytest.raises(UnsupportedModelError, match=message):
        learn_rotary(model)


def test_a_model_without_numbers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="meta device"):
        learn_rotary(make("llama").to("meta"))


@torch.no_grad()
def test_equal_frequencies_do_no_harm() -> None:
    model = make("llama")
    equal = torch.tensor([1.0, 0.5, 0.5, 0.25, 0.5, 0.0, 0.1, 0.0])
    model.model.rotary_emb.inv_freq.copy_(equal)
    assert sorted(learn_rotary(model)[0].order.tolist()) == list(range(16))
    for before, own, ours in rotations(model, 20):
        bound = (44 + 10) * U * pair_lengths(before, 16)
        assert bool(((ours.double() - own.double()).abs() <= bound).all())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        # Keys are split before the function sees them.
        ("stablelm", {}),
        ("phi", {}),
        # No rotary module, but a table of sines.
        ("gptj", {}),
        # Several rotary modules, one of them unused.
        ("granite_swa", {"sliding_window": 16}),
    ],
)
def test_families_with_another_rotation_are_refused(
    model_type: str, options: dict[str, Any]
) -> None:
    model = make_tiny_family(model_type, **options)
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        learn_rotary(model)
