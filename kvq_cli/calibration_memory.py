"""Whether a calibration fits into memory, as ``kvq calibrate`` asks before it loads weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvq_cli.output import Output
from kvq_cli.sizes import show_bytes
from kvq_formats.errors import NotEnoughMemoryError

if TYPE_CHECKING:
    from kvq_calibration.memory import CalibrationMemory
    from kvq_calibration.plan import CalibrationPlan

SHORTEST = 256
"""Tokens of the shortest window that is offered: shorter ones show little of a context."""


@dataclass(frozen=True)
class Loading:
    """How the weights will be loaded; fields as the arguments of ``load_model``."""

    dtype: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    load_in: str | None = None


def memory_of(
    plan: CalibrationPlan,
    loading: Loading,
    *,
    batch_size: int,
    seq_len: int | None = None,
    sensitivity: str | None = None,
    device_map: str | None = None,
    load_in: str | None = None,
) -> CalibrationMemory:
    """Count what a plan would need, or what it would with other options than its own."""
    from kvq_calibration.memory import plan_calibration_memory

    config = plan.config
    if sensitivity is not None:
        config = config.model_copy(update={"sensitivity": sensitivity})
    return plan_calibration_memory(
        plan.model,
        config,
        num_samples=plan.num_samples,
        seq_len=seq_len or plan.seq_len,
        batch_size=batch_size,
        dtype=loading.dtype,
        device_map=device_map or loading.device_map,
        attn_implementation=loading.attn_implementation,
        load_in=load_in or loading.load_in,
    )


def memory_line(memory: CalibrationMemory) -> str:
    """One line: what goes where, and what there is."""
    return (
        f"weights {show_bytes(memory.weights)} + activations {show_bytes(memory.activations)} = "
        f"{show_bytes(memory.total)} of {show_bytes(memory.available)} available"
    )


def say_memory(output: Output, memory: CalibrationMemory) -> None:
    """Print the plan on stderr."""
    output.note(f"memory: {memory_line(memory)}")


def memory_facts(memory: CalibrationMemory) -> list[tuple[str, str]]:
    """Rows of ``--dry-run``: the parts of the pass that needs more."""
    parts = {
        "keys and values": memory.keys_and_values,
        "gradients": memory.gradients,
        "checkpoints": memory.checkpoints,
        "one layer": max(memory.forward, memory.recomputation),
        "logits": memory.logits,
    }
    used = ", ".join(f"{name} {show_bytes(count)}" for name, count in parts.items() if count)
    return [
        ("memory", f"{memory_line(memory)} on {memory.device}"),
        ("activations", f"{used}; not all at once"),
    ]


def check_memory(plan: CalibrationPlan, loading: Loading, *, batch_size: int) -> CalibrationMemory:
    """Count, and raise NotEnoughMemoryError, which names what would fit, if it does not."""
    count: Callable[..., CalibrationMemory] = partial(memory_of, plan, loading)
    memory = count(batch_size=batch_size)
    if memory.fits:
        return memory
    others = {
        "--batch-size 1": count(batch_size=1),
        "--load-in-4bit": count(batch_size=batch_size, load_in="4bit"),
        "--sensitivity none": count(batch_size=batch_size, sensitivity="none"),
    }
    if memory.device.startswith("cuda"):
        others["--device-map auto"] = count(batch_size=batch_size, device_map="auto")
    helpful = {
        name: other
        for name, other in others.items()
        if other.total < memory.total or other.available > memory.available
    }
    offers = [name for name, other in helpful.items() if other.fits]
    shorter = _longest_window(memory, partial(count, batch_size=batch_size))
    if shorter is not None:
        offers.insert(0, f"--seq-len {shorter}")
    # Where nothing is enough by itself, all that helps is named together.
    hint = ", or ".join(offers) or ", with ".join([*helpful, f"--seq-len {SHORTEST}"])
    raise NotEnoughMemoryError(
        f"calibration does not fit into memory: {memory_line(memory)} on {memory.device}, with "
        f"{memory.batch_size} x {memory.seq_len} tokens a step.",
        hint=hint,
    )


def _longest_window(
    memory: CalibrationMemory, count: Callable[..., CalibrationMemory]
) -> int | None:
    """The longest window that fits, halved until it does; None if the shortest does not."""
    tokens = memory.seq_len
    while tokens // 2 >= SHORTEST:
        tokens //= 2
        if count(seq_len=tokens).fits:
            return tokens
    return None
