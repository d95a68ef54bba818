"""What the command line brings along: the embedded default model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvq_formats.errors import ModelError

if TYPE_CHECKING:
    from kvq_runtime.models import ResolvedModel

EMBEDDED_MODEL_ID = "kvq/tiny-llama"
"""The id that a sidecar of the embedded model carries."""


def embedded_model_path() -> Path:
    """Return the folder of the embedded model; raises ModelError if the installation lacks it."""
    path = Path(__file__).parent / "tiny-llama"
    if not (path / "config.json").is_file():
        raise ModelError(
            "the embedded model is missing from this installation of kvq.",
            hint="name a model: kvq calibrate MODEL, or install kvq again",
        )
    return path


def resolve(
    name: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> ResolvedModel:
    """Find a model by its name; None and the embedded model's id both mean the embedded one.

    Raises what ``kvq_runtime.models.resolve_model`` raises.
    """
    from kvq_runtime.models import resolve_model

    if name is None or name == EMBEDDED_MODEL_ID:
        return resolve_model(embedded_model_path(), revision=revision, record_id=EMBEDDED_MODEL_ID)
    return resolve_model(name, revision=revision, trust_remote_code=trust_remote_code)
