"""Generating as ``kvq generate`` and ``kvq demo`` do: streamed text, and what the cache held."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvq_cli.decode_graph import DecodeGraph, decode_graph
from kvq_cli.output import Output
from kvq_cli.peak_memory import peak_memory_json
from kvq_cli.sizes import show_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from kvq_cli.memory_plan import Room
    from kvq_cli.prompts import Prompt
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.cache import PackedCache
    from kvq_runtime.generate import Generation
    from kvq_runtime.implementation import Implementation
    from kvq_runtime.memory import MemoryPlan
    from kvq_runtime.models import LoadedModel
    from kvq_runtime.sampling import Sampling

SCHEMA = "kvq.generate/1"


def stream_text(
    output: Output,
    loaded: LoadedModel,
    input_ids: Tensor,
    cache: PackedCache,
    *,
    new_tokens: int,
    prefill_chunk: int | None,
    sampling: Sampling,
) -> Generation:
    """Continue a prompt int64 ``[1, T]`` on an attached model, and print the text as it comes.

    Raises GenerationInterrupted.
    """
    from kvq_runtime.generate import generate_text

    with ExitStack() as bars:
        progress = bars.enter_context(output.progress("prefill"))

        def show(piece: str) -> None:
            # Bars and text on one terminal would write over each other.
            bars.close()
            output.stream(piece)

        return generate_text(
            loaded.model,
            loaded.tokenizer,
            input_ids,
            cache=cache,
            max_new_tokens=new_tokens,
            prefill_chunk=prefill_chunk,
            sampling=sampling,
            on_text=show,
            progress=progress,
        )


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
        why = " (a page of exact tokens is always there)" if self.held > self.bf16 else ""
        return (
            f"{self.tokens:,} tokens are held in {show_bytes(self.held)} "
            f"({show_bytes(self.allocated)} allocated); a bf16 cache of them would need "
            f"{show_bytes(self.bf16)}{ratio}{why}"
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
        cuda_graph: whether to decode from one; None where it can be.
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
    cuda_graph: bool | None

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
        from kvq_runtime.generate import GenerationInterrupted

        model = self.loaded.model
        with attach(model, self.sidecar, rule=self.rule, impl=self.requested):
            cache = PackedCache(model, self.sidecar, capacity=self.room.capacity)
            is_slow_by_choice = self.requested == "reference"
            with decode_graph(
                output, model, cache, wanted=self.cuda_graph, silent=is_slow_by_choice
            ) as graph:
                try:
                    generation = stream_text(
                        output,
                        self.loaded,
                        input_ids,
                        cache,
                        new_tokens=self.room.new_tokens,
                        prefill_chunk=self.prefill_chunk,
                        sampling=self.sampling,
                    )
                except GenerationInterrupted as interrupted:
                    self._report(output, interrupted.generation, cache, graph)
                    raise
                self._report(output, generation, cache, graph)

    def _report(
        self, output: Output, generation: Generation, cache: PackedCache, graph: DecodeGraph
    ) -> None:
        holding = Holding.of(cache)
        if generation.text and not generation.text.endswith("\n"):
            output.stream("\n")
        if output.as_json:
            output.result(self._json(generation, holding, graph))
        if self.rule == "exact-prefill":
            output.note("made with --exact-prefill: the prompt read itself unquantized")
        rate = generation.tokens_per_second
        output.note(
            f"{generation.prompt_tokens:,} tokens read in {generation.prefill_seconds:.1f} s, "
            f"{len(generation.token_ids):,} generated"
            + (f" at {rate:.1f} a second" if rate is not None else "")
            + (", from a CUDA graph" if graph.to_json()["replays"] else "")
            + f" (wall clock); ended by: {self._finish_reason(generation)}"
        )
        output.note(holding.sentence())

    def _finish_reason(self, generation: Generation) -> str:
        at_context = generation.finish_reason == "length" and self.room.cut
        return "context" if at_context else generation.finish_reason

    def _json(self, generation: Generation, holding: Holding, graph: DecodeGraph) -> dict[str, Any]:
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
            "cuda_graph": graph.to_json(),
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
