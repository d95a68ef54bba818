"""The embedded model: small, trained, and part of the installation, so that kvq can be tried."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kvq_formats.errors import ModelError
from kvq_formats.records import EMBEDDED_MODEL_ID

__all__ = ["EMBEDDED_MODEL_ID", "embedded_model_path"]

# The name of the package that carries the files. They are data, read as such: nothing here uses
# code of the layer above.
_HOLDER = "kvq_cli"


def embedded_model_path() -> Path:
    """The folder of the embedded model, for ``from_pretrained``.

    Raises ModelError if the installation lacks it.
    """
    try:
        path = Path(str(files(_HOLDER) / "assets" / "tiny-llama"))
    except ModuleNotFoundError as error:
        raise _missing() from error
    if not (path / "config.json").is_file():
        raise _missing()
    return path


def _missing() -> ModelError:
    return ModelError(
        "the embedded model is missing from this installation of kvq.",
        hint="name a model: kvq calibrate MODEL, or install kvq again",
    )
