"""What the GPU benchmark measures: shapes of attention, widths of codes, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpu_report import Report

from kvq_formats.config import KVQConfig


@dataclass(frozen=True)
class Shape:
    """Attention of one layer; of a whole model also all else."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: int = 1
    hidden: int = 32
    intermediate: int = 32
    vocabulary: int = 256

    @property
    def group(self) -> int:
        """G."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Codes:
    """Bits of keys and of values, and the share of outliers."""

    bits: int
    outlier_fraction: float

    @property
    def config(self) -> KVQConfig:
        """All other options have their defaults."""
        return KVQConfig(
            key_bits=self.bits, value_bits=self.bits, outlier_fraction=self.outlier_fraction
        )

    @property
    def columns(self) -> dict[str, object]:
        """Cells of a row."""
        return {
            "key_bits": self.bits,
            "value_bits": self.bits,
            "outliers": f"{self.outlier_fraction:.0%}",
        }

    @property
    def name(self) -> str:
        """For people."""
        return f"kvq {self.bits} bit" + (" with outliers" if self.outlier_fraction else "")


@dataclass(frozen=True)
class DecodeCase:
    """One layer's decode step.

    Fields:
        bits: of keys and values that it is packed with.
        both_paths: whether the portable path is timed beside one that the launch table prefers.
    """

    shape: Shape
    batch: int
    tokens: int
    bits: Sequence[int] = (2, 3, 4)
    both_paths: bool = False

    @property
    def columns(self) -> dict[str, object]:
        """Cells of a row."""
        return {"shape": self.shape.name, "batch": self.batch, "tokens": self.tokens}


LLAMA_2_7B = Shape("Llama-2-7B", 32, 32, 128)
LLAMA_3_8B = Shape("Llama-3-8B", 32, 8, 128, 32, 4096, 14_336, 128_256)
QWEN_25_7B = Shape("Qwen2.5-7B", 28, 4, 128)
TINY = Shape("tiny", 2, 1, 16)


@dataclass(frozen=True)
class Sizes:
    """How large everything is; what matters most comes first, as time may run out.

    Fields:
        cases, codes: decode steps, and what each is packed with.
        parts_case: the step whose kernels are timed one by one.
        prompt: tokens that are packed at once.
        chunk, past: queries of a prefill, and tokens before them.
        hidden, intermediate: widths of the layer beside which packing is put.
        model_prompt, model_tokens: tokens that a model reads, and then decodes a round.
        captured_shape, captured_tokens: of a whole model, and how much its cache holds.
        captured_steps, captured_rounds: tokens of a round; all rounds together fill a page.
        copied_bytes: of the tensor that bandwidth is measured with.
    """

    cases: Sequence[DecodeCase]
    codes: Sequence[Codes]
    parts_case: DecodeCase
    prompt_shape: Shape
    prompt: int
    chunk: int
    past: int
    hidden: int
    intermediate: int
    model_prompt: int
    model_tokens: int
    model_rounds: int
    captured_shape: Shape
    captured_tokens: int
    captured_steps: int
    captured_rounds: int
    copied_bytes: int


FULL = Sizes(
    cases=(
        DecodeCase(LLAMA_3_8B, 1, 131_072, both_paths=True),
        DecodeCase(LLAMA_3_8B, 1, 65_536, both_paths=True),
        DecodeCase(LLAMA_3_8B, 1, 32_768, both_paths=True),
        DecodeCase(LLAMA_2_7B, 1, 65_536, bits=(3,), both_paths=True),
        DecodeCase(LLAMA_2_7B, 1, 32_768, bits=(3,), both_paths=True),
        DecodeCase(LLAMA_3_8B, 16, 8192, both_paths=True),
        DecodeCase(LLAMA_2_7B, 1, 131_072),
        DecodeCase(QWEN_25_7B, 1, 131_072),
        DecodeCase(QWEN_25_7B, 1, 32_768),
        DecodeCase(LLAMA_3_8B, 1, 8192),
        DecodeCase(LLAMA_2_7B, 1, 8192),
        DecodeCase(QWEN_25_7B, 1, 8192),
    ),
    codes=(Codes(3, 0.01), Codes(4, 0.01), Codes(2, 0.01), Codes(3, 0.0)),
    parts_case=DecodeCase(LLAMA_3_8B, 1, 131_072),
    prompt_shape=LLAMA_3_8B,
    prompt=32_768,
    chunk=4096,
    past=28_672,
    hidden=4096,
    intermediate=14_336,
    model_prompt=8192,
    model_tokens=32,
    model_rounds=4,
    captured_shape=LLAMA_3_8B,
    captured_tokens=131_072,
    captured_steps=64,
    captured_rounds=4,
    copied_bytes=2 * 2**30,
)

SMOKE = Sizes(
    cases=(DecodeCase(TINY, 1, 280),),
    codes=(Codes(3, 0.01),),
    parts_case=DecodeCase(TINY, 1, 280),
    prompt_shape=TINY,
    prompt=256,
    chunk=40,
    past=256,
    hidden=64,
    intermediate=128,
    model_prompt=260,
    model_tokens=1,
    model_rounds=1,
    captured_shape=TINY,
    captured_tokens=258,
    captured_steps=1,
    captured_rounds=1,
    copied_bytes=2**20,
)


@dataclass(frozen=True)
class Bench:
    """What every part is given."""

    device: torch.device
    report: Report
    sizes: Sizes
    smoke: bool
