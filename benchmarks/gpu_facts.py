"""Which device, and which versions."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_report import Deadline
from gpu_shapes import Bench
from results_csv import REPOSITORY, commit, processor

NVIDIA_SMI = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "pstate")


def device_name(device: torch.device) -> str:
    """Name of the GPU; of the processor where kernels are interpreted."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def file_name(device: torch.device) -> str:
    """Of the results, from the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".csv"


def common_columns(device: torch.device, *, given_commit: str | None) -> dict[str, object]:
    """Columns that every row ends with."""
    return {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "transformers": _version("transformers"),
        "kvq": _kvq_version(),
        "commit": given_commit or commit(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _kvq_version() -> str:
    """The source's, as nothing is installed where this runs."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def run_facts(bench: Bench, deadline: Deadline) -> None:
    """What the driver and torch say of the device."""
    report = bench.report
    report.add("facts", "device", "name", device_name(bench.device))
    report.add("facts", "host", "cores", os.cpu_count() or 0, "", processor())
    report.add("facts", "host", "load", round(os.getloadavg()[0], 2))
    if bench.device.type != "cuda":
        report.add("facts", "device", "kind", "interpreter", "", "times mean nothing")
        return
    properties = torch.cuda.get_device_properties(bench.device)
    major, minor = torch.cuda.get_device_capability(bench.device)
    free, total = torch.cuda.mem_get_info(bench.device)
    for metric, value, unit in (
        ("capability", f"{major}.{minor}", ""),
        ("multiprocessors", properties.multi_processor_count, ""),
        ("L2", properties.L2_cache_size, "B"),
        ("memory", total, "B"),
        ("free memory", free, "B"),
    ):
        report.add("facts", "device", metric, value, unit)
    for metric, value in _nvidia_smi(bench.device.index or 0).items():
        report.add("facts", "device", metric, value)


def _nvidia_smi(index: int) -> dict[str, str]:
    """What nvidia-smi says; nothing where there is none."""
    command = ["nvidia-smi", f"--id={index}", "--format=csv,noheader"]
    command.append(f"--query-gpu={','.join(NVIDIA_SMI)}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(NVIDIA_SMI, (cell.strip() for cell in done.stdout.split(",")), strict=False))
