"""How a model rotates its keys, learned from the model's own functions.

Families differ in which channels form a rotary pair, how many are rotated at all, and how
frequencies are scaled. None of it is written down here. A rotary function is linear in the key: at
cosine 0 and sine 1 it maps the identity to a signed permutation, which names the pairs. A rotary
module is asked for the angles of position 1, which tells the frequency of each pair. What was
learned is then compared with the model's own rotation, so that a model that does anything else is
refused before it has cached a token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvq_formats.errors import UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint
from kvq_kernels.rotary import RotaryAngles, rotate
from kvq_runtime.rope import ROTARY_FUNCTION, attention_modules
from kvq_runtime.rotary_channels import UNROTATED, RotaryChannels
from kvq_runtime.rotary_source import (
    FREQUENCIES,
    RotarySource,
    find_source,
    unsupported_rotation,
)
from kvq_runtime.supported_models import quantized_layers, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKED_POSITIONS = (0, 1, 7, 300)

ROUNDINGS = 10
"""Roundings to f32, beside that of the angle, by which two rotations of a pair differ.

In units of ``2**-24`` times scaling times the length of the pair. The model's: cosine and sine to
2 units in the last place and their scaling, ``3 sqrt(2)``; products and their sum, 2. Ours: cosine
and sine, products and their sum, 3.
"""

SAME_ANGLE = 2.0**-21
"""Relative difference of two sines at position 1 that are of one frequency.

A f32 sine that is off by 2 units in the last place is off by up to ``2**-22``, and its scaling
adds a rounding.
"""


@dataclass(frozen=True, eq=False)
class LayerRotary:
    """How one layer rotates its keys.

    Fields:
        order: i64 ``[D]`` on the CPU, a permutation: ``stored = keys[..., order]`` is in rotary
            channel order.
        rotary_dim: R, channels that are rotated.
        read_angles: what ``angles`` calls.
        channels: those that the layer hands to the model's rotary function.
    """

    order: Tensor
    rotary_dim: int
    read_angles: Callable[[], RotaryAngles]
    channels: RotaryChannels
    _orders: dict[torch.device, Tensor | slice] = field(
        default_factory=dict, init=False, repr=False
    )

    def ordered(self, x: Tensor) -> Tensor:
        """``[..., D]`` in rotary channel order; ``x`` itself where that is the model's own."""
        order = self._orders.get(x.device)
        if order is None:
            straight = torch.equal(self.order, torch.arange(len(self.order)))
            # A slice copies nothing.
            order = slice(None) if straight else self.order.to(x.device)
            self._orders[x.device] = order
        return x[..., order]

    def angles(self) -> RotaryAngles:
        """The angles of the model as it is now.

        Dynamic and longrope types change their frequencies as a forward runs. While they stay the
        same this is the same object, with the tables that it keeps.
        """
        return self.read_angles()


def unrotated(head_dim: int) -> LayerRotary:
    """A layer without RoPE, told as a rotation by nothing: every pair has frequency 0."""
    if head_dim % 2:
        raise UnsupportedModelError(
            f"layers without RoPE have keys of {head_dim} channels, expected an even number."
        )
    angles = RotaryAngles(torch.zeros(head_dim // 2, dtype=torch.float64, device="cpu"))
    order = torch.arange(head_dim, device="cpu")
    return LayerRotary(order, head_dim, lambda: angles, channels=UNROTATED)


def learn_rotary(
    model: PreTrainedModel, channels: Mapping[int, RotaryChannels] | None = None
) -> Mapping[int, LayerRotary]:
    """How each quantized layer of ``model`` rotates its keys, by layer index.

    ``channels`` are those that go through the model's rotary function, all of a key in layers that
    are not in it.

    Runs the model's rotary modules and functions on a few small tensors; the model, its hooks, and
    the random state stay as they were.

    Raises UnsupportedModelError where a layer's rotation cannot be found, or is not a rotation of
    pairs of channels by ``position * frequency``.
    """
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    head_dim = Fingerprint.from_config(text_config(model.config)).head_dim
    names = {module: name for name, module in model.named_modules()}
    rotary = {
        name: module
        for module, name in names.items()
        if any(buffer.endswith(FREQUENCIES) for buffer in module._buffers)
    }
    attentions = attention_modules(model)
    learned: dict[tuple[nn.Module, str | None, Callable[..., Any], int], LayerRotary] = {}
    layers: dict[int, LayerRotary] = {}
    bare: LayerRotary | None = None
    for layer_idx in quantized_layers(model.config):
        if layer_idx not in attentions:
            raise unsupported_rotation(
                model, f"layer {layer_idx} has no attention that kvq understands"
            )
        start, stop = (channels or {}).get(layer_idx, (0, head_dim))
        if (start, stop) == UNROTATED:
            # One for all, as with the others: what is made for one token serves every layer.
            layers[layer_idx] = bare = bare or unrotated(head_dim)
            continue
        attention = attentions[layer_idx]
        layer_type = types[layer_idx] if types else None
        source = find_source(model, rotary, names[attention], layer_type)
        function = _rotary_function(model, attention)
        key = (source.module, source.layer_type, function, stop - start)
        if key not in learned:
            part = _learn(_Probe(model, source, function, stop - start))
            learned[key] = _within(part, (start, stop), head_dim)
        layers[layer_idx] = learned[key]
    return layers


def _within(part: LayerRotary, channels: RotaryChannels, head_dim: int) -> LayerRotary:
    """What was learned of a part of a key, told of the whole of it."""
    start, stop = channels
    rest = [*range(start), *range(stop, head_dim)]
    order = torch.cat([part.order + start, torch.tensor(rest, dtype=torch.int64, device="cpu")])
    return replace(part, order=order, channels=channels)


def _rotary_function(model: nn.Module, attention: nn.Module) -> Callable[..., Any]:
    file = sys.modules[type(attention).__module__]
    function: Callable[..., Any] | None = getattr(file, ROTARY_FUNCTION, None)
    if function is None:
        raise unsupported_rotation(model, f"{file.__name__} has no {ROTARY_FUNCTION}")
    if list(inspect.signature(function).parameters)[:2] != ["q", "k"]:
        raise unsupported_rotation(
            model, f"{ROTARY_FUNCTION} of {file.__name__} does not take queries and keys together"
        )
    return function


@dataclass(frozen=True)
class _Probe:
    """One rotary module with the function that uses its angles.

    Fields:
        model: for messages.
        head_dim: channels of a key that the function is given.
    """

    model: nn.Module
    source: RotarySource
    function: Callable[..., Any]
    head_dim: int

    def unsupported(self, reason: str) -> UnsupportedModelError:
        return unsupported_rotation(self.model, reason)

    @property
    def device(self) -> torch.device:
        return self.source.frequencies.device

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own cosines and sines of ``[T]`` positions, f32 ``[1, T, channels]``."""
        try:
            found = self.source.cos_sin(positions)
        except (TypeError, RuntimeError) as error:
            raise self.unsupported(
                f"{type(self.source.module).__name__} fails on positions alone ({error})"
            ) from error
        parts = found if isinstance(found, tuple | list) else (found,)
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        if len(shapes) != 2 or {shape[:-1] for shape in shapes} != {(1, len(positions))}:
            raise self.unsupported(
                f"{type(self.source.module).__name__} returns tensors of shapes {shapes}, expected "
                f"cosines and sines of (1, {len(positions)}, channels)"
            )
        return parts[0], parts[1]

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own rotation of ``[1, heads, T, D]``."""
        try:
            q_rotated, k_rotated = self.function(q, k, cos, sin)
        except (TypeError, RuntimeError, ValueError) as error:
            raise self.unsupported(
                f"{ROTARY_FUNCTION} fails on keys of {self.head_dim} channels ({error})"
            ) from error
        if q_rotated.shape != q.shape or k_rotated.shape != k.shape:
            raise self.unsupported(f"{ROTARY_FUNCTION} changes the shape of what it rotates")
        return q_rotated, k_rotated


@torch.no_grad()
def _learn(probe: _Probe) -> LayerRotary:
    if probe.source.frequencies.is_meta:
        raise probe.unsupported("it is on the meta device and has no frequencies to read")
    with probe.source.undisturbed():
        pairs, rest = _pairs(probe)
    with probe.source.undisturbed():
        pairs = _by_frequency(probe, pairs)
    first, second = zip(*pairs, strict=True)
    order = torch.tensor([*first, *second, *rest], dtype=torch.int64, device="cpu")
    with probe.source.undisturbed():
        _check(probe, order)
    return LayerRotary(
        order=order,
        rotary_dim=2 * len(pairs),
        read_angles=probe.source.angles,
        channels=(0, probe.head_dim),
    )


def _pairs(probe: _Probe) -> tuple[list[tuple[int, int]], list[int]]:
    """Channels (first, second) of each rotary pair, and those that are not rotated.

    At cosine 0 and sine 1 a pair (1, 0) becomes (0, 1), and (0, 1) becomes (-1, 0).
    """
    D = probe.head_dim
    cos, _ = probe.cos_sin(torch.arange(D, device=probe.device))
    identity = torch.eye(D, dtype=torch.float32, device=probe.device)[None, None]
    _, image = probe.rotate(identity, identity, torch.zeros_like(cos), torch.ones_like(cos))
    image = image[0, 0]
    targets = image.abs().argmax(dim=-1)
    signs = image.gather(1, targets[:, None])[:, 0]
    exact = torch.zeros_like(image).scatter_(1, targets[:, None], signs[:, None].sign())
    to, sign = targets.tolist(), signs.sign().tolist()
    pairs = [(a, to[a]) for a in range(D) if to[a] != a and sign[a] == 1.0]
    rest = [a for a in range(D) if to[a] == a and sign[a] == 1.0]
    closed = all(to[b] == a and sign[b] == -1.0 for a, b in pairs)
    if not torch.equal(image, exact) or not pairs or not closed or 2 * len(pairs) + len(rest) != D:
        raise probe.unsupported(
            f"at cosine 0 and sine 1, {ROTARY_FUNCTION} does not turn pairs of channels by a "
            "right angle"
        )
    return pairs, rest


def _by_frequency(probe: _Probe, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs in the order of the rotary module's frequencies."""
    cos, sin = probe.cos_sin(torch.ones(1, dtype=torch.int64, device=probe.device))
    angles = probe.source.snapshot()
    frequencies = angles.frequencies
    if len(frequencies) != len(pairs):
        raise probe.unsupported(
            f"{len(pairs)} pairs of channels are rotated by {len(frequencies)} frequencies"
        )
    first, second = (list(members) for members in zip(*pairs, strict=True))
    vector = torch.zeros(1, 1, 1, probe.head_dim, dtype=torch.float32, device=probe.device)
    vector[..., first] = 1.0
    rotated = probe.rotate(vector, vector, cos, sin)[1][0, 0, 0].double()
    found_cos, found_sin = rotated[first, None], rotated[second, None]
    # At position 1 the model's f32 angle is the frequency itself.
    expected_cos = frequencies.cos() * angles.scaling
    expected_sin = frequencies.sin() * angles.scaling
    matches = (found_sin - expected_sin).abs() <= SAME_ANGLE * expected_sin.abs()
    matches &= (found_cos - expected_cos).abs() <= SAME_ANGLE * angles.scaling
    placed: dict[int, tuple[int, int]] = {}
    for pair, row in zip(pairs, matches, strict=True):
        candidates = row.nonzero()[:, 0].tolist()
        if len({frequencies[index].item() for index in candidates}) > 1:
            raise probe.unsupported(f"frequencies {candidates} are too close to be told apart")
        # Equal frequencies: any of them will do.
        free = [index for index in candidates if index not in placed]
        if not free:
            raise probe.unsupported(
                f"at position 1, channels {pair} are not rotated by a frequency in {FREQUENCIES!r}"
            )
        placed[free[0]] = pair
    return [placed[index] for index in range(len(pairs))]


def _check(probe: _Probe, order: Tensor) -> None:
    """Compare with the model's own rotation of random vectors of different lengths."""
    positions = torch.tensor(CHECKED_POSITIONS, dtype=torch.int64, device=probe.device)
    cos, sin = probe.cos_sin(positions)
    angles = probe.source.snapshot()
    # A generator of its own: the caller's random state stays as it was.
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (1, 3, len(positions), probe.head_dim)
    vectors = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    lengths = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float32, device="cpu")
    vectors = (vectors * lengths[:, None, None]).to(probe.device)
    q, k = vectors[:, 1:], vectors[:, :1]
    own_cos, own_sin = angles.cos_sin(positions)
    turns = positions[:, None] * angles.frequencies.abs()
    half, order = len(angles.frequencies), order.to(probe.device)
    for before, after in zip((q, k), probe.rotate(q, k, cos, sin), strict=True):
        ours = rotate(before[..., order], own_cos, own_sin)
        error = (ours - after[..., order]).abs()
        length = before[..., order[:half]].hypot(before[..., order[half : 2 * half]])
        bound = (turns + ROUNDINGS) * 2.0**-24 * angles.scaling * length
        # Channels that are not rotated have no room for an error.
        bound = torch.cat([bound, bound, torch.zeros_like(error[..., 2 * half :])], dim=-1)
        if not bool((error <= bound).all()):
            worst = (error - bound).nan_to_num(nan=torch.inf).amax().item()
            raise probe.unsupported(
                f"at positions {', '.join(map(str, CHECKED_POSITIONS))} it is not the rotation by "
                f"position times {FREQUENCIES} (off by {worst:.1e} more than rounding explains)"
            )
