"""Whether kvq understands a model: tried out on a miniature of it, before any weights are read.

The miniature runs a text of more than a page and a few decode steps twice: as it is, and on packed
pages that lose nothing (the identity path). The first run tells what each layer does: whether it
attends, over how many keys of which size, and which of their channels go through RoPE. The second
must give the same outputs, layer by layer, up to roundings. Families are not known by name: what
behaves like a model that works does work, and what does not is refused with the layer that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvq_formats.config import PAGE_TOKENS
from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint
from kvq_runtime.cache_argument import cache_name, returned_cache
from kvq_runtime.drift import Drift, ReplayTap
from kvq_runtime.exact_pages import exact_codecs
from kvq_runtime.miniature import make_miniature
from kvq_runtime.observe import Observations, ObservingTap
from kvq_runtime.rope import tap_attention
from kvq_runtime.rotary_channels import RotaryChannels
from kvq_runtime.supported_models import (
    EXAMPLE,
    check_supported,
    layer_types,
    quantized_layers,
    text_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROMPT_TOKENS = PAGE_TOKENS + 44
"""A page, a sink, and queries that read the page."""

PADDING = 5
"""Tokens that the first row of two lacks on its left."""

DECODE_STEPS = 2


@dataclass(frozen=True)
class ExaminedLayer:
    """What was found of one layer.

    Fields:
        layer_idx: its index.
        kind: as transformers makes caches by: ``full_attention``, ``sliding_attention``, ...
        quantized: whether its cache is packed; else the stock cache stays.
        rotary_channels: channels of its keys that go through RoPE; None if it is not quantized.
        options: what its attention honours besides a scale: ``softcap``, ``s_aux`` (learned sinks).
        drift: how far the identity path was off, in units of what rounding explains; None if it is
            not quantized.
    """

    layer_idx: int
    kind: str
    quantized: bool
    rotary_channels: RotaryChannels | None = None
    options: tuple[str, ...] = ()
    drift: float | None = None


def examine(
    config: PreTrainedConfig,
    *,
    name: str,
    model_class: type[PreTrainedModel] | None = None,
    trust_remote_code: bool = False,
) -> tuple[ExaminedLayer, ...]:
    """Try out whether kvq can serve a model of ``config``; one entry a layer.

    Args:
        config: the model's.
        name: of the model, for messages.
        model_class: of a model that is loaded already.
        trust_remote_code: as for ``from_pretrained``.

    Raises UnsupportedModelError, with the reason, where it cannot.
    """
    check_supported(config, name=name)
    model = make_miniature(
        config, name=name, model_class=model_class, trust_remote_code=trust_remote_code
    )
    quantized = quantized_layers(model.config)
    with torch.no_grad():
        seen = _observe(model, name)
        channels = {index: _checked(seen, index, model, name) for index in quantized}
        drifts = _identity(model, seen, channels, name)
    return tuple(
        ExaminedLayer(
            layer_idx=index,
            kind=kind,
            quantized=index in channels,
            rotary_channels=channels.get(index),
            options=seen.options.get(index, ()),
            drift=drifts[index].relative if index in drifts else None,
        )
        for index, kind in enumerate(layer_types(config))
    )


def _observe(model: PreTrainedModel, name: str) -> Observations:
    """Run the stock miniature."""
    tap = ObservingTap()
    try:
        with tap_attention(model, tap):
            _feed(model)
    except KVQError:
        raise
    # Model code of anybody: what it raises is the reason why it was not understood.
    except Exception as error:
        raise _refused(
            name,
            "cannot be tried before its weights are loaded: a small model of its configuration "
            f"fails by itself ({_one_line(error)})",
        ) from error
    return tap.observations


def _checked(seen: Observations, index: int, model: PreTrainedModel, name: str) -> RotaryChannels:
    """The rotated channels of a layer that is to be quantized, if it does what that takes."""
    shape = Fingerprint.from_config(text_config(model.config))
    expected = (shape.num_kv_heads, shape.head_dim)
    found = seen.shapes.get(index)
    if found is None:
        raise _refused(
            name, f"has a layer {index} of full attention that never calls an attention function"
        )
    key, value = found
    if key != expected or value != expected:
        raise _refused(
            name,
            f"attends in layer {index} over keys of (heads, channels) {key} and values of {value}; "
            f"its configuration says {expected} for both",
        )
    channels = seen.channels.get(index)
    if channels is None:
        raise _refused(
            name,
            f"changes the keys of layer {index} between RoPE and attention (a norm, a scale or the "
            "like); kvq stores keys before RoPE and cannot follow",
        )
    return channels


def _identity(
    model: PreTrainedModel,
    seen: Observations,
    channels: Mapping[int, RotaryChannels],
    name: str,
) -> Mapping[int, Drift]:
    """Run the miniature on pages that lose nothing; raise where a layer differs."""
    try:
        codecs = exact_codecs(model, channels)
    except UnsupportedModelError as error:
        raise _refused(name, f"is not understood: {error.message.rstrip('.')}") from error
    tap = ReplayTap(model, codecs, seen, angles_to=PROMPT_TOKENS + DECODE_STEPS)
    try:
        with tap_attention(model, tap):
            _feed(model)
    except KVQError as error:
        raise _refused(name, f"cannot run on packed pages: {error.message.rstrip('.')}") from error
    # It ran by itself: what it raises now is about something that it does with its cache.
    except Exception as error:
        raise _refused(
            name, f"does something with its cache that packed pages cannot do ({_one_line(error)})"
        ) from error
    for index in channels:
        drift = tap.drifts.get(index)
        if drift is None:
            raise _refused(name, f"never attends over the packed pages of layer {index}")
        if not drift.relative <= 1:
            raise _refused(
                name,
                f"does not do in layer {index} what kvq makes of it: on packed pages that lose "
                f"nothing its attention is off by {drift.found:.2g}, and rounding explains "
                f"{drift.bound:.2g}",
            )
    return tap.drifts


def _feed(model: PreTrainedModel) -> None:
    """A prompt of two rows, the first padded on its left, and decode steps."""
    generator = torch.Generator().manual_seed(1)
    total = PROMPT_TOKENS + DECODE_STEPS
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, total), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache: Any = None
    name = cache_name(model.forward)
    start = 0
    for stop in (PROMPT_TOKENS, *range(PROMPT_TOKENS + 1, total + 1)):
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            use_cache=True,
            **{name: cache},
        )
        cache, start = returned_cache(output), stop


def _refused(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} {reason}.", hint=EXAMPLE)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
