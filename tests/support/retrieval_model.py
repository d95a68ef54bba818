"""Where the small model lies that was trained on retrieval tasks."""

from __future__ import annotations

from pathlib import Path

RETRIEVAL_MODEL = Path(__file__).resolve().parents[2] / "benchmarks" / "models" / "tiny-retrieval"
