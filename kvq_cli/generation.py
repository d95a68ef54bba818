"""Generating as ``kvq generate`` does: how much room, what it needs, what came out."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvq_cli.output import Output
from kvq_cli.peak_memory import peak_memory_json
from kvq_cli.sizes import context_for, context_within, show_bytes, show_tokens
from kvq_formats.errors import DataError, NotEnoughMemoryError

if TYPE_CHECKING:
    from torch import Tensor

    from kvq_cli.prompts import Prompt
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.cache import PackedCache
    from kvq_runtime.generate import Generation
    from kvq_runtime.implementation import Implementation
    from kvq_runtime.memory import MemoryPlan
    from kvq_runtime.models import LoadedModel
    from kvq_runtime.sampling import Sampling

SCHEMA = "kvq.generate/1"

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
        replan: makes a plan of the same context from a sidecar, ``prefill_chunk``, ``dtype`` and
            ``device``.
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
    config = sidecar.config.model_copy(update={"key_bits": 2, "value_bits": 2})
    return replace(sidecar, config=config, layers=layers)


@dataclass(frozen=True)
class Holding:
    """What a cache held when generation ended; see ``PackedCache``."""

    tokens: int
    held: int
    allocated: int
    bf16: int

    @classmethod
    def of(cls, cache: PackedCache) -> Holding:
        """Read them off a cache of one row."""
        tokens = cache.tokens_held[0]
        return cls(tokens, cache.held_bytes, cache.allocated_bytes, cache.bf16_bytes)

    @property
    def effective_bits(self) -> float | None:
        """Bits a cached number, from the bytes held; None where there is none."""
        return 16 * self.held / self.bf16 if self.bf16 else None

    def sentence(self) -> str:
        """For people."""
        ratio = f": {self.bf16 / self.held:.2f}x" if self.held and self.bf16 else ""
        return (
            f"{self.tokens:,} tokens are held in {show_bytes(self.held)} "
            f"({show_bytes(self.allocated)} allocated); a bf16 cache of them would need "
            f"{show_bytes(self.bf16)}{ratio}"
        )

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        bits = self.effective_bits
        return {
            "tokens_held": self.tokens,
            "held_bytes": self.held,
            "allocated_bytes": self.allocated,
            "bf16_bytes": self.bf16,
            "effective_bits": None if bits is None else round(bits, 4),
        }


@dataclass(frozen=True)
class Run:
    """Everything that a generation is made of.

    Fields:
        loaded: model and tokenizer.
        sidecar, sidecar_path: what it runs with.
        prompt: what it continues.
        room: tokens that it may hold.
        plan: memory that was planned for.
        implementation, requested: of attention, and what the user asked for; None by device.
        prefill_chunk: tokens of the prompt a forward; None for ``--exact-prefill``.
        sampling: how tokens are chosen.
    """

    loaded: LoadedModel
    sidecar: Sidecar
    sidecar_path: Path
    prompt: Prompt
    room: Room
    plan: MemoryPlan
    implementation: Implementation
    requested: Literal["reference", "triton"] | None
    prefill_chunk: int | None
    sampling: Sampling

    @property
    def rule(self) -> Literal["runtime", "exact-prefill"]:
        """What a query sees, as ``kvq.attach`` calls it."""
        return "exact-prefill" if self.prefill_chunk is None else "runtime"

    def generate(self, output: Output, input_ids: Tensor) -> None:
        """Stream the text, then say what it took; what Ctrl-C leaves is reported, too.

        Raises GenerationInterrupted when that is done.
        """
        from kvq_runtime.attach import attach
        from kvq_runtime.cache import PackedCache
        from kvq_runtime.generate import GenerationInterrupted, generate_text

        model = self.loaded.model
        with (
            attach(model, self.sidecar, rule=self.rule, impl=self.requested),
            ExitStack() as bars,
        ):
            cache = PackedCache(model, self.sidecar, capacity=self.room.capacity)
            progress = bars.enter_context(output.progress("prefill"))

            def show(piece: str) -> None:
                # Bars and text on one terminal would write over each other.
                bars.close()
                output.stream(piece)

            try:
                generation = generate_text(
                    model,
                    self.loaded.tokenizer,
                    input_ids,
                    cache=cache,
                    max_new_tokens=self.room.new_tokens,
                    prefill_chunk=self.prefill_chunk,
                    sampling=self.sampling,
                    on_text=show,
                    progress=progress,
                )
            except GenerationInterrupted as interrupted:
                bars.close()
                self._report(output, interrupted.generation, cache)
                raise
            bars.close()
            self._report(output, generation, cache)

    def _report(self, output: Output, generation: Generation, cache: PackedCache) -> None:
        holding = Holding.of(cache)
        if generation.text and not generation.text.endswith("\n"):
            output.stream("\n")
        if output.as_json:
            output.result(self._json(generation, holding))
        if self.rule == "exact-prefill":
            output.note("made with --exact-prefill: the prompt read itself unquantized")
        rate = generation.tokens_per_second
        output.note(
            f"{generation.prompt_tokens:,} tokens read in {generation.prefill_seconds:.1f} s, "
            f"{len(generation.token_ids):,} generated"
            + (f" at {rate:.1f} a second" if rate is not None else "")
            + f" (wall clock); ended by: {self._finish_reason(generation)}"
        )
        output.note(holding.sentence())

    def _finish_reason(self, generation: Generation) -> str:
        at_context = generation.finish_reason == "length" and self.room.cut
        return "context" if at_context else generation.finish_reason

    def _json(self, generation: Generation, holding: Holding) -> dict[str, Any]:
        from importlib.metadata import version

        rate = generation.tokens_per_second
        return {
            "schema": SCHEMA,
            "kvq_version": version("kvq"),
            "base_model": self.loaded.record.model_dump(mode="json"),
            "sidecar": {
                "path": str(self.sidecar_path),
                "config": self.sidecar.config.model_dump(mode="json"),
            },
            "prompt_source": self.prompt.source,
            "prompt_tokens": generation.prompt_tokens,
            "generated_tokens": len(generation.token_ids),
            "text": generation.text,
            "finish_reason": self._finish_reason(generation),
            **holding.to_json(),
            "plan": self.plan.to_json(),
            "implementation": asdict(self.implementation),
            "device": str(self.loaded.model.device),
            "rule": self.rule,
            "max_new_tokens": self.room.new_tokens,
            "sampling": self.sampling.to_json(),
            "wall_clock": {
                "prefill_seconds": round(generation.prefill_seconds, 4),
                "decode_seconds": round(generation.decode_seconds, 4),
                "decode_tokens_per_second": None if rate is None else round(rate, 3),
            },
            "peak_memory": peak_memory_json(),
        }
