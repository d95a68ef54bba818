"""Whether weights, cache and a calibration fit into the memory that is free here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvq_cli.checks.check import Asked, Check
from kvq_cli.sizes import context_within, show_bytes
from kvq_formats.errors import KVQError

if TYPE_CHECKING:
    from kvq_cli.checks.cache_memory import CacheMemory
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.memory import MemoryPlan
    from kvq_runtime.resolve import ResolvedModel


def check_room(
    model: ResolvedModel, sidecar: Sidecar, cache: CacheMemory, asked: Asked
) -> tuple[Check, dict[str, Any] | None]:
    """Weights and a cache fit into free memory: the longest context, packed and as bf16."""
    from kvq_runtime.memory import plan_memory

    name = "memory"
    try:
        plan = plan_memory(
            model, sidecar, context=cache.tokens, dtype=asked.dtype, device=asked.device_map
        )
    except KVQError as error:
        if error.exit_code == 2:
            raise
        return Check.failure(name, error), None
    packed, stock = plan.largest_context(), _largest_stock(plan, cache)
    limit = model.context_limit
    if limit is not None:
        packed, stock = min(packed, limit), min(stock, limit)
    found = {**plan.to_json(), "largest_context": packed, "largest_bf16_context": stock}
    has = f"{show_bytes(plan.available)} are free on {plan.device}, weights take "
    has += show_bytes(plan.weights)
    if packed == 0 or (asked.context is not None and not plan.fits):
        few = f"--context {context_within(packed)}" if packed else "--dtype bfloat16"
        largest = f"; the largest context that fits is {packed:,} tokens" if packed else ""
        return (
            Check(
                name,
                "fail",
                f"{plan.context:,} tokens do not fit: {has}, the cache "
                f"{show_bytes(plan.cache)}, scratch {show_bytes(plan.scratch)}{largest}.",
                f"{few}, fewer --bits, --device-map auto, or a smaller model",
            ),
            found,
        )
    trained = model.max_positions
    beyond = "" if trained is None else f" (the model was made for {trained:,})"
    message = f"{has}: room for a context of {packed:,} tokens packed, {stock:,} as bf16{beyond}"
    return Check(name, "pass", message), found


def check_calibration_memory(
    model: ResolvedModel, asked: Asked
) -> tuple[Check, dict[str, dict[str, Any]]]:
    """A calibration with the default windows fits into free memory, with and without gradients."""
    from kvq_calibration.memory import plan_calibration_memory
    from kvq_calibration.plan import DEFAULT_NUM_SAMPLES, DEFAULT_SEQ_LEN

    seq_len = min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    plans = {
        sensitivity: plan_calibration_memory(
            model,
            asked.config.model_copy(update={"sensitivity": sensitivity}),
            num_samples=DEFAULT_NUM_SAMPLES,
            seq_len=seq_len,
            dtype=asked.dtype,
            device_map=asked.device_map,
        )
        for sensitivity in ("fisher", "none")
    }
    fisher, none = plans["fisher"], plans["none"]
    found = {sensitivity: plan.to_json() for sensitivity, plan in plans.items()}
    message = (
        f"{show_bytes(fisher.total)} with windows of {seq_len:,} tokens, "
        f"{show_bytes(none.total)} with --sensitivity none; {show_bytes(fisher.available)} are "
        f"free on {fisher.device}"
    )
    if fisher.fits:
        return Check("calibration", "pass", message), found
    less = "--sensitivity none, or " if none.fits else "--sensitivity none with "
    hint = f"{less}a shorter --seq-len, --dtype bfloat16, --load-in-4bit, --device-map auto"
    return Check("calibration", "fail", f"{message}.", f"kvq calibrate {hint}"), found


def check_context(model: ResolvedModel, tokens: int | None) -> Check | None:
    """The context that was asked for against what the model can do; None if nothing is wrong."""
    from kvq_cli.memory_plan import check_within_window

    if tokens is None:
        return None
    try:
        check_within_window(tokens, model.context_limit, name=model.record.id)
    except KVQError as error:
        return Check.failure("context", error)
    positions = model.max_positions
    if positions is not None and tokens > positions:
        return Check(
            "context",
            "note",
            f"{tokens:,} tokens are beyond the {positions:,} positions that the model was made for",
        )
    return None


def _largest_stock(plan: MemoryPlan, cache: CacheMemory) -> int:
    """The longest context with a bf16 cache and the same scratch; 0 if there is no room."""
    room = plan.available - plan.weights - plan.scratch - cache.as_it_is
    return max(0, room // cache.bf16_a_token)
