"""``kvq env``: what a bug report needs to know about this machine."""

from __future__ import annotations

import os
import platform
from typing import Any

import typer

from kvq_cli.options import AsJson, NoProgress, Quiet, Verbose
from kvq_cli.output import Output

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "scikit-learn",
    "numpy",
    "pydantic",
    "typer",
    "rich",
)
SCHEMA = "kvq.env/1"


def env(
    context: typer.Context,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_progress: NoProgress = False,
) -> None:
    """Print versions, hardware and folders for a bug report.

    Markdown, ready to paste, or JSON. Nothing is sent anywhere, and no key or token is read.

    [bold]Examples[/bold]
      kvq env
      kvq env --json
    """
    output: Output = context.obj
    output.configure(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
    from rich.text import Text

    found = collect()
    lines = ["| what | value |", "|---|---|"]
    lines += [f"| {name} | {_show(value)} |" for name, value in _flat(found)]
    output.result({"schema": SCHEMA, **found}, Text("\n".join(lines), no_wrap=True))


def collect() -> dict[str, Any]:
    """Return versions, devices and folders; nothing in it is secret."""
    from kvq_cli.session import cache_folder
    from kvq_formats.sidecar_header import FORMAT_VERSION

    return {
        "kvq": {"version": _version("kvq"), "sidecar_format": FORMAT_VERSION},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _torch(),
        "folders": {
            "HF_HOME": os.environ.get("HF_HOME"),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE"),
            "kvq_cache": str(cache_folder()),
        },
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """What torch sees; its import can fail on a broken installation, which is worth reporting."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "gpus": devices,
    }


def _flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as ``a.b`` rows."""
    rows: list[tuple[str, Any]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(" ".join(str(part) for part in item.values()) for item in value) or "none"
    return "none" if value is None else str(value)
