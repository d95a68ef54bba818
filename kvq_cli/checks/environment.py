"""Versions that kvq needs, and whether Python finds kvq's own packages and no others."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from kvq_cli.checks.check import Check

NEWEST_TRANSFORMERS = "5.24"
"""The newest that the tests have run with, as ``constraints.txt`` has it; newer ones may do."""

OWN_PACKAGES = (
    "kvq",
    "kvq_cli",
    "kvq_evaluation",
    "kvq_calibration",
    "kvq_runtime",
    "kvq_kernels",
    "kvq_formats",
)


def check_versions() -> Check:
    """Every dependency is there and not older than kvq allows; a newer transformers is noted."""
    from packaging.version import Version

    try:
        wanted = requires("kvq") or []
    except PackageNotFoundError:
        return Check("versions", "note", "kvq is not installed as a package: nothing to compare")
    wrong = list(_unmet(wanted))
    if wrong:
        upgrade = " ".join(f"'{requirement}'" for requirement, _ in wrong)
        found = "; ".join(f"{requirement} is needed, {what}" for requirement, what in wrong)
        return Check("versions", "fail", f"{found}.", f"pip install --upgrade {upgrade}")
    transformers = version("transformers")
    message = (
        f"kvq {version('kvq')}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {transformers}"
    )
    newest = Version(NEWEST_TRANSFORMERS)
    if Version(transformers).release[:2] > newest.release[:2]:
        return Check(
            "versions",
            "note",
            f"{message}, which is newer than {NEWEST_TRANSFORMERS}, the newest that was tested",
        )
    return Check("versions", "pass", message)


def check_imports() -> Check:
    """All of kvq comes from one place, and nothing else goes by the name of one of its packages."""
    root = Path(__file__).resolve().parents[2]
    for name in OWN_PACKAGES:
        origin = _origin(name)
        # Beside each other in a wheel; one folder deeper, most of them, in the repository.
        if origin is None or root not in (origin.parent, origin.parent.parent):
            found = "it is not there" if origin is None else f"Python finds {origin}"
            return Check(
                "imports",
                "fail",
                f"another {name} is in the way: {found}, expected it in {root}.",
                "rename it, or start kvq in another folder and without PYTHONPATH",
            )
    return Check("imports", "pass", f"kvq's {len(OWN_PACKAGES)} packages come from {root}")


def _origin(name: str) -> Path | None:
    """The package's folder, or the module's file."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).resolve()
    return path.parent if path.name == "__init__.py" else path


def _unmet(wanted: list[str]) -> Iterator[tuple[str, str]]:
    """Requirements that are not met, each with what was found."""
    from packaging.requirements import Requirement

    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = f"{requirement.name}{requirement.specifier}"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield name, "none is installed"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield name, f"{found} is installed"
