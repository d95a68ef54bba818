"""How much room a generation gets, and whether it fits into memory, as ``kvq generate`` asks."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvq_cli.output import Output
from kvq_cli.sizes import context_for, context_within, show_bytes, show_tokens
from kvq_formats.errors import ConfigError, DataError, NotEnoughMemoryError

if TYPE_CHECKING:
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.memory import MemoryPlan

SMALL_CHUNK = 64
"""A prefill chunk that is offered where memory is short."""


@dataclass(frozen=True)
class Room:
    """Tokens that a run may hold.

    Fields:
        capacity: tokens of the cache.
        new_tokens: at most so many are generated.
        cut: whether ``new_tokens`` are fewer than asked for, because the context ends.
    """

    capacity: int
    new_tokens: int
    cut: bool = False


def make_room(output: Output, prompt_tokens: int, *, context: int | None, new_tokens: int) -> Room:
    """Fit prompt and new tokens into the context; without one, the cache is made for both.

    Raises DataError where the prompt leaves no room.
    """
    wanted = prompt_tokens + new_tokens
    if context is None:
        return Room(wanted, new_tokens)
    left = context - prompt_tokens
    if left < 1:
        raise DataError(
            f"the prompt has {prompt_tokens:,} tokens; --context {show_tokens(context)} holds "
            f"{context:,}, a new one among them.",
            hint=f"--context {context_for(wanted)}, or a shorter prompt",
        )
    if left < new_tokens:
        output.note(
            f"at most {left:,} new tokens, not {new_tokens:,}: the prompt has {prompt_tokens:,}, "
            f"and the context {context:,}; --context {context_for(wanted)} has room for all"
        )
        return Room(context, left, cut=True)
    return Room(context, new_tokens)


def warn_beyond_positions(output: Output, capacity: int, positions: int | None) -> None:
    """Say where text may outgrow what the model was trained for."""
    if positions is not None and capacity > positions:
        output.warn(
            f"a context of {capacity:,} tokens is beyond the {positions:,} positions that the "
            "model was trained for: past them its text may make no sense"
        )


def check_within_window(capacity: int, limit: int | None, *, name: str) -> None:
    """Refuse a context that the packed cache of a model whose layers all have a window cannot hold.

    Raises ConfigError.
    """
    if limit is not None and capacity > limit:
        raise ConfigError(
            f"all layers of {name} attend within a window of {limit:,} tokens, and its packed "
            f"cache serves texts of up to that length; {capacity:,} were asked for.",
            hint=f"--context {context_within(limit)} with a prompt that leaves room, or fewer "
            "--max-new-tokens; the stock cache of transformers serves longer texts",
        )


def say_plan(output: Output, plan: MemoryPlan, *, in_full: bool) -> None:
    """Print the memory plan: a table of lines, or one."""
    if not in_full:
        parts = {"weights": plan.weights, "cache": plan.cache, "scratch": plan.scratch}
        what = " + ".join(f"{name} {show_bytes(count)}" for name, count in parts.items())
        output.note(
            f"memory: {what} = {show_bytes(plan.total)} of {show_bytes(plan.available)} available"
        )
        return
    rows = [
        ("weights", plan.weights, ""),
        ("cache", plan.cache, f"a bf16 cache would need {show_bytes(plan.bf16_cache)}"),
        ("scratch", plan.scratch, f"for {plan.prefill_chunk:,} tokens of the prompt at a time"),
        ("total", plan.total, ""),
        ("available", plan.available, f"on {plan.device}"),
    ]
    lines = [f"{name:<10}{show_bytes(count):>9}   {more}".rstrip() for name, count, more in rows]
    output.note("\n".join([f"memory for {plan.context:,} tokens:", *lines]))


def check_plan(
    plan: MemoryPlan,
    sidecar: Sidecar,
    replan: Callable[..., MemoryPlan],
    *,
    dtype: str,
    is_exact: bool,
    needed: int,
) -> None:
    """Raise NotEnoughMemoryError, which names what would fit, if ``plan`` does not.

    Args:
        plan: of the run.
        sidecar: what it runs with.
        replan: makes a plan of the same context from a sidecar, ``prefill_chunk``, ``dtype``,
            ``device`` and ``load_in``.
        dtype: of the weights, as asked for.
        is_exact: whether the prompt is read in one piece (``--exact-prefill``).
        needed: tokens of the prompt and a new one; a shorter context is of no use.
    """
    if plan.fits:
        return
    options = {"prefill_chunk": plan.prefill_chunk, "dtype": dtype, "device": plan.device}
    few = min(SMALL_CHUNK, plan.prefill_chunk)
    calibrate = shlex.join(["kvq", "calibrate", sidecar.base_model.id, "--bits", "2"])
    chunks = f"--prefill-chunk {SMALL_CHUNK}" + (" without --exact-prefill" if is_exact else "")
    others = {
        calibrate: replan(_at_two_bits(sidecar), **options),
        chunks: replan(sidecar, **{**options, "prefill_chunk": few}),
        "--dtype bfloat16": replan(sidecar, **{**options, "dtype": "bfloat16"}),
        "--load-in-4bit": replan(sidecar, **{**options, "load_in": "4bit"}),
    }
    if plan.device.startswith("cuda"):
        others["--device-map auto"] = replan(sidecar, **{**options, "device": "auto"})
    helpful = {
        name: other
        for name, other in others.items()
        if other.total < plan.total or other.device != plan.device
    }
    largest = plan.largest_context()
    offers = [f"--context {context_within(largest)}"] if largest >= needed else []
    offers += [name for name, other in helpful.items() if other.fits]
    # Where nothing is enough by itself, all that helps is named together.
    hint = ", or ".join(offers) or ", with ".join(helpful)
    raise NotEnoughMemoryError(
        f"{plan.context:,} tokens do not fit into memory: weights {show_bytes(plan.weights)} + "
        f"cache {show_bytes(plan.cache)} + scratch {show_bytes(plan.scratch)} = "
        f"{show_bytes(plan.total)}, and {show_bytes(plan.available)} are available on "
        f"{plan.device}; the largest context that fits is {largest:,} tokens.",
        hint=hint or "a smaller model, or a machine with more memory",
    )


def _at_two_bits(sidecar: Sidecar) -> Sidecar:
    """A sidecar of the same shape with the shortest codes; it serves to count bytes only."""
    import torch

    from kvq_formats.codebook import Codebook

    codebook = Codebook.fit_grid(torch.linspace(-1.0, 1.0, 4))
    layers = {
        layer_idx: replace(
            layer,
            key=replace(layer.key, codebook=codebook),
            value=replace(layer.value, codebook=codebook),
        )
        for layer_idx, layer in sidecar.layers.items()
    }
    config = sidecar.config.model_copy(update={"key_bits": 2, "value_bits": 2, "layer_bits": {}})
    return replace(sidecar, config=config, layers=layers)
