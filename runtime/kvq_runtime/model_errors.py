"""What a model's loading says when it fails, put into words."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq_formats.errors import KVQError, ModelError, UnsupportedModelError
from kvq_runtime.hub import explain_hub_error
from kvq_runtime.model_files import check_weights
from kvq_runtime.weight_quantization import install_hint

if TYPE_CHECKING:
    from kvq_runtime.resolve import ResolvedModel


def explain_load_error(error: BaseException, resolved: ResolvedModel) -> KVQError | None:
    """The sentence for an error of ``from_pretrained``; None if it is not a known one."""
    if not resolved.is_local:
        explained = explain_hub_error(
            error, resolved.location, revision=resolved.record.revision, raises=ModelError
        )
        if explained is not None:
            return explained
    if "trust_remote_code" in str(error):
        return explain_config_error(error, resolved.record.id)
    if "provide an `offload_folder`" in str(error):
        return ModelError(
            f"{resolved.record.id} fits neither into the GPUs' memory nor into the host's, and its "
            "weights are stored in another form than they are used in: to offload them to the disk "
            "they would have to be written anew.",
            hint="--load-in-4bit, or a machine with more memory",
        )
    if isinstance(error, ImportError):
        return ModelError(
            f"loading {resolved.record.id} needs a package that is not installed: "
            f"{first_line(error)}",
            hint=install_hint(error),
        )
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ModelError(
                f"the disk is full or a quota is reached while {resolved.record.id} is downloaded.",
                hint="free some space (hf cache rm), or set HF_HOME to a folder on another disk",
            )
        return ModelError(f"{resolved.record.id} cannot be loaded: {first_line(error)}")
    return None


def explain_config_error(error: BaseException, location: str) -> KVQError:
    """The sentence for a configuration that was found and cannot be read."""
    text = str(error)
    if "trust_remote_code" in text:
        return ModelError(
            f"{location} brings its own code, which transformers would have to run.",
            hint="read that code, then add --trust-remote-code",
        )
    if "does not recognize this architecture" in text:
        import transformers

        kind = re.search(r"model type `(\S+)`", text)
        return UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model type "
            f"{kind[1] if kind else ''} of {location}.",
            hint="pip install --upgrade transformers",
        )
    return ModelError(
        f"the configuration of {location} cannot be read: {first_line(error)}",
        hint="copy or download its config.json again",
    )


def check_report(report: dict[str, Any], resolved: ResolvedModel) -> None:
    """Raise ModelError if transformers made up weights: measuring them would mean nothing.

    ``report`` is what ``output_loading_info`` gives.
    """
    if missing := sorted(report.get("missing_keys") or ()):
        raise ModelError(
            f"the weights of {resolved.record.id} lack {len(missing)} tensors that its config.json "
            f"asks for, such as {missing[0]}.",
            hint="copy or download weights and config.json again",
        )
    if mismatched := sorted(report.get("mismatched_keys") or ()):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"the weights of {resolved.record.id} do not fit its config.json: {name} is "
            f"{list(found)}, expected {list(expected)}.",
            hint="copy or download weights and config.json again",
        )


def damaged_weights(resolved: ResolvedModel, error: BaseException) -> ModelError:
    """The error for weights that safetensors refuses; names the file where it can be told."""
    if resolved.is_local:
        folder, hint = Path(resolved.location), "copy or download the file again"
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(
            resolved.location, "config.json", revision=resolved.record.revision
        )
        folder = Path(cached).parent if isinstance(cached, str) else Path(resolved.location)
        hint = f"hf download {resolved.location} --force-download"
    try:
        check_weights(folder)
    except ModelError as named:
        return ModelError(named.message, hint=hint)
    return ModelError(
        f"the weights of {resolved.record.id} are damaged: {first_line(error)}", hint=hint
    )


def out_of_memory(resolved: ResolvedModel, dtype: str, device: str) -> ModelError:
    """The error for weights that do not fit."""
    return ModelError(
        f"out of memory while loading {resolved.record.id} (dtype {dtype}, device_map {device}).",
        hint="--dtype bfloat16, --device-map auto, or a smaller model",
    )


def first_line(error: BaseException) -> str:
    """The first sentence or so of a message, ended by one full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Validation errors end a line with a colon and give the reason on the next.
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text.rstrip(".") + "."
