"""Whether kernels do on this machine what the reference does, on a few tokens of a miniature."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvq_cli.checks.check import Check
from kvq_cli.checks.stand_in import stand_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.implementation import ImplementationName

F16_UNIT = 2.0**-11
"""A rounding to f16, relative."""

PROMPT_TOKENS = 262
"""A page, a sink, and a few tokens of the next page."""


def check_kernel_trial(
    miniature: PreTrainedModel, sidecar: Sidecar, device: torch.device, *, runs: bool
) -> Check:
    """Kernels pack the bytes that the reference packs, and attend as it does, on a few tokens."""
    name = "kernel trial"
    if not runs:
        return Check(
            name,
            "note",
            f"not run: attention is plain torch on {device}, where no kernel would run",
        )
    own = _sidecar_of(miniature, sidecar)
    try:
        if (field := _pack_differs(own, device)) is not None:
            return _wrong(f"packing on {device} gives other {field} than the reference")
        off, bound = _attention_differs(miniature, own, device)
    # Compilers and drivers raise errors of their own; all of them mean that kernels cannot run.
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        return _wrong(f"kernels cannot run on {device} ({type(error).__name__}: {line})")
    if not off <= bound:
        return _wrong(
            f"attention on {device} is off by {off:.2g} from the reference, and rounding explains "
            f"{bound:.2g}"
        )
    return Check(
        name,
        "pass",
        f"packing on {device} gives the same bytes as the reference, and attention is off by "
        f"{off:.1e}, where roundings to 16 bits explain {bound:.1e}",
    )


def _wrong(what: str) -> Check:
    hint = "--impl reference, and please report it with `kvq env --json`"
    return Check("kernel trial", "fail", f"{what}.", hint)


def _sidecar_of(miniature: PreTrainedModel, sidecar: Sidecar) -> Sidecar:
    """The same options and rotated channels on fewer heads."""
    from kvq_formats.fingerprint import Fingerprint
    from kvq_runtime.supported_models import text_config

    shape = Fingerprint.from_config(text_config(miniature.config))
    record = sidecar.base_model.model_copy(update={"fingerprint": shape})
    channels = dict.fromkeys(sidecar.layers, (0, shape.head_dim))
    return stand_in(record, sidecar.config, {**channels, **sidecar.rotary_channels})


def _pack_differs(sidecar: Sidecar, device: torch.device) -> str | None:
    """The first field of two pages that is not packed byte for byte alike."""
    import torch

    from kvq_runtime.page_codec import SidecarPageCodec

    layer_idx, first = next(iter(sidecar.layers.items()))
    config = sidecar.config.for_layer(layer_idx)
    on_host, on_device = (
        SidecarPageCodec(first, config, None, device=place) for place in ("cpu", device)
    )
    shape = (on_host.num_kv_heads, 2 * 256, on_host.head_dim)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    expected: tuple[Any, Any] = on_host.encode(keys, values)
    found: tuple[Any, Any] = on_device.encode(keys.to(device), values.to(device), impl="triton")
    for want, got in zip(expected, found, strict=True):
        for field in fields(want):
            one, other = getattr(want, field.name), getattr(got, field.name).cpu()
            if field.name != "base_positions" and not _same_bytes(one, other):
                return f"{field.name} of {type(want).__name__}"
    return None


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    import torch

    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _attention_differs(
    miniature: PreTrainedModel, sidecar: Sidecar, device: torch.device
) -> tuple[float, float]:
    """How far kernels are off in the first packed layer, and what roundings explain.

    What comes before that layer is the same in both runs. Kernels round keys, queries, weights and
    values to f16, each by up to a unit u: a score by two units of its largest magnitude S, which
    changes a weight by a factor of at most ``e**(4 S u)``; weights and values by two more. S and
    the largest value are those of the stock model, doubled, because codes move them.
    """
    model, first = miniature.to(device), min(sidecar.layers)
    try:
        score, value = _largest(model, first)
        reference = _attended(model, sidecar, "reference")
        kernels = _attended(model, sidecar, "triton")
    finally:
        miniature.to("cpu")
    off = max(
        float((found - expected).abs().max())
        for found, expected in zip(kernels, reference, strict=True)
    )
    return off, (math.expm1(4 * 2 * score * F16_UNIT) + 4 * F16_UNIT) * 2 * value


def _largest(model: PreTrainedModel, layer_idx: int) -> tuple[float, float]:
    """Largest score and value of a layer of the stock model."""
    from kvq_runtime.observe import ObservingTap
    from kvq_runtime.rope import tap_attention

    tap = ObservingTap()
    with tap_attention(model, tap):
        _feed(model)
    calls = [call for (_, index), call in tap.observations.calls.items() if index == layer_idx]
    return max(call.largest_score for call in calls), max(call.largest_value for call in calls)


def _attended(model: PreTrainedModel, sidecar: Sidecar, impl: ImplementationName) -> list[Tensor]:
    """Outputs of the first packed layer, of a prompt and of a token."""
    from kvq_runtime.page_codec import page_codecs
    from kvq_runtime.rope import AttentionCall, tap_attention
    from kvq_runtime.runtime_rule import RuntimeTap

    first, outputs = min(sidecar.layers), []

    class Recording(RuntimeTap):
        def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            output, weights = super().on_attention(call)
            if call.layer_idx == first:
                outputs.append(output.float())
            return output, weights

    with tap_attention(
        model, Recording(model, page_codecs(model, sidecar), rule="runtime", impl=impl)
    ):
        _feed(model)
    return outputs


def _feed(model: PreTrainedModel) -> None:
    import torch

    generator = torch.Generator().manual_seed(2)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, PROMPT_TOKENS + 1), generator=generator)
    ids = ids.to(model.device)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
