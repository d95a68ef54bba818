"""Make a virtual environment that differs from this one in its transformers only.

    .venv/bin/python scripts/overlay_environment.py --oldest .venv-oldest
    .venv/bin/python scripts/overlay_environment.py --newest .venv-newest

The new environment sees every package of the one that runs this script, and before them its own:
the transformers asked for, and what pip's resolver finds that it needs in another version. So torch
and the rest are not installed again. ``pip check`` has the last word on whether all requirements
are met, those of kvq itself included.

``--oldest`` takes the lower bound in ``pyproject.toml``, ``--newest`` what the registry has.
"""

from __future__ import annotations

import argparse
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "transformers"
BELOW = "zz_kvq_below.pth"
"""The file that puts the other environment's packages behind the new one's."""


def lower_bound(pyproject: str, package: str = PACKAGE) -> Version:
    """The oldest version of ``package`` that ``pyproject.toml`` allows."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    (requirement,) = [it for it in map(Requirement, dependencies) if it.name == package]
    bounds = [Version(it.version) for it in requirement.specifier if it.operator in (">=", "==")]
    if len(bounds) != 1:
        raise SystemExit(
            f"Error: pyproject.toml says {str(requirement)!r}, expected one lower bound.\n"
            f"Hint: {package}>=MAJOR.MINOR"
        )
    return bounds[0]


def make_overlay(directory: Path, *, below: Path) -> tuple[Path, Path]:
    """A new environment over the packages in ``below``: its python, and its own packages."""
    venv.EnvBuilder(clear=True, with_pip=False, symlinks=True).create(directory)
    base = {"base": str(directory), "platbase": str(directory)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=base))
    # As site does for a folder of packages, its own .pth files (editable kvq) included.
    packages.joinpath(BELOW).write_text(f"import site; site.addsitedir({str(below)!r})\n")
    return Path(sysconfig.get_path("scripts", "venv", vars=base)) / "python", packages


def pip(python: Path, *arguments: str) -> None:
    """Run the pip of the environment below in the one that ``python`` belongs to."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"Error: {' '.join(command)} failed; see above.")


def main() -> None:
    """Make the environment, install, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--oldest", action="store_true", help="the oldest version that is supported")
    which.add_argument("--newest", action="store_true", help="the newest version that there is")
    parser.add_argument("directory", type=Path, help="replaced if it exists")
    arguments = parser.parse_args()
    wanted = [PACKAGE, "--upgrade"]
    if arguments.oldest:
        pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        wanted = [f"{PACKAGE}=={lower_bound(pyproject)}"]
    python, packages = make_overlay(arguments.directory, below=Path(sysconfig.get_path("purelib")))
    pip(python, "install", "--quiet", *wanted)
    pip(python, "check")
    pip(python, "list", "--path", str(packages))


if __name__ == "__main__":
    main()
