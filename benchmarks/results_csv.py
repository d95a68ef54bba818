"""Result files: a CSV that says which weights, versions and commit it came from."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from kvq_evaluation.report import EvaluationRow

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN_LINES = 10


def provenance(model: nn.Module, *, name: str, seq_len: int) -> dict[str, object]:
    """Columns that every row starts with; ``weights`` is a digest of all parameters.

    Of a model whose weights are partly on the host or the disk it is ``offloaded``.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return _origin(model, name=name, seq_len=seq_len, weights="offloaded")
    digest = hashlib.sha256()
    for key, parameter in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(parameter.detach().cpu().contiguous().float().numpy().tobytes())
    return _origin(model, name=name, seq_len=seq_len, weights=digest.hexdigest()[:12])


def _origin(model: nn.Module, *, name: str, seq_len: int, weights: str) -> dict[str, object]:
    first = next(model.parameters())
    return {
        "model": name,
        "weights": weights,
        "device": first.device.type,
        "dtype": str(first.dtype).removeprefix("torch."),
        "seq_len": seq_len,
        "kvq": version("kvq"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit(),
    }


def machine() -> dict[str, object]:
    """Columns of timings and memory: the machine, what it was doing, versions and commit."""
    import torch

    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "kvq": version("kvq"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit(),
    }


def processor() -> str:
    """Name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, ``+`` behind it where tracked files differ from it."""
    head, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    return (head or "unknown") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    """What git prints; nothing where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def plain(row: EvaluationRow) -> dict[str, Any]:
    """An evaluation row's cells, without what windows and layers have each."""
    apart = ("per_window", "attention_error")
    return {name: value for name, value in row.to_json().items() if name not in apart}


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of equal columns under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: cell(v) for k, v in row.items()} for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cell(value: object) -> object:
    """What is written of a value; None leaves its place empty."""
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else value


class PlainProgress:
    """A line on stderr at the beginning of a stage and every ten seconds."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Yield a callable that marks one step as done."""
        begun = said = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said >= SECONDS_BETWEEN_LINES or done == total:
                said = now
                print(f"{name} {done}/{total} {now - begun:.0f} s", file=sys.stderr)

        yield advance
