"""What lies in a model's folder or repository, judged by names and headers, before it is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from kvq_formats.errors import ModelError
from kvq_formats.sidecar_header import TENSORS_FILE

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

TOKENIZER_FILE = re.compile(
    r"tokenizer\.(json|model)|tokenizer_config\.json|vocab\.(json|txt)|.*\.(tiktoken|model)|"
    r"tekken\.json"
)
ORIGINAL_WEIGHTS = re.compile(r"consolidated.*\.(pth|safetensors)|checklist\.chk|.*\.pth")
PICKLED_WEIGHTS = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")

ORIGINAL_REPOSITORY = re.compile(
    r"meta-llama/(Llama-2-\d+b(-chat)?|CodeLlama-\d+b(-Instruct|-Python)?)"
)
"""Repositories that hold Meta's own format; their names plus ``-hf`` hold transformers' format."""


def check_repository_name(repo_id: str) -> None:
    """Raise ModelError for a repository that is known to hold no transformers weights."""
    if ORIGINAL_REPOSITORY.fullmatch(repo_id):
        raise ModelError(
            f"{repo_id} holds Meta's original weights (consolidated.*.pth), not transformers "
            "weights.",
            hint=f"use {repo_id}-hf",
        )


def is_complete(names: Collection[str]) -> bool:
    """Whether configuration and weights are among the files."""
    return "config.json" in names and (WEIGHTS in names or WEIGHTS_INDEX in names)


def check_files(names: Collection[str], *, name: str, is_local: bool) -> None:
    """Raise ModelError, which says what is there instead, unless configuration and weights are.

    ``names`` are the files of the folder or repository called ``name``.
    """
    twin = "a folder that `save_pretrained` wrote" if is_local else f"{name}-hf, if there is one"
    if is_complete(names):
        return
    if TENSORS_FILE in names:
        raise ModelError(
            f"{name} is a kvq sidecar, not a model.", hint=f"kvq eval --sidecar {name}"
        )
    if "adapter_config.json" in names:
        raise ModelError(
            f"{name} is an adapter (adapter_config.json), not a whole model.",
            hint="merge it into its base model (peft: merge_and_unload) and save the result",
        )
    if pickled := _matching(names, PICKLED_WEIGHTS):
        raise ModelError(
            f"{name} holds its weights as a pickle ({pickled}); kvq reads safetensors only.",
            hint="load and save it once: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(DIR)",
        )
    if original := _matching(names, ORIGINAL_WEIGHTS):
        raise ModelError(
            f"{name} holds weights in the format of its authors ({original}), not transformers "
            "weights.",
            hint=f"use {twin}",
        )
    if gguf := next((file for file in sorted(names) if file.endswith(".gguf")), None):
        raise ModelError(
            f"{name} holds GGUF weights ({gguf}), not transformers weights.",
            hint="use the repository that they were converted from",
        )
    missing = f"weights ({WEIGHTS})" if "config.json" in names else "config.json"
    raise ModelError(
        f"{name} is not a transformers model: it has no {missing}.",
        hint="MODEL is a Hub id or a folder with config.json, weights and tokenizer",
    )


def has_tokenizer(names: Collection[str]) -> bool:
    """Whether any file is one that a tokenizer is read from."""
    return _matching(names, TOKENIZER_FILE) is not None


def check_weights(folder: Path) -> None:
    """Raise ModelError that names the file if weights are missing, truncated or unreadable.

    Reads the headers only.
    """
    for file in weight_files(folder):
        if not file.is_file():
            raise ModelError(
                f"the weights of {folder} are not complete: {file.name} is missing.",
                hint="copy or download the folder again",
            )
        if (what := _damage(file)) is not None:
            raise ModelError(f"{file} is damaged: {what}.", hint="copy or download the file again")


def stored_dtype(folder: str | os.PathLike[str]) -> str | None:
    """Torch's name of the type of the first floating-point weight; None if there is none.

    Reads headers only.
    """
    import safetensors

    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    for file in weight_files(Path(folder)):
        with safetensors.safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if found := names.get(tensors.get_slice(name).get_dtype()):
                    return found
    return None


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights, one or those of the index; raises ModelError for a bad index."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} cannot be read: {error}.", hint="copy or download the file again"
        ) from error


def _damage(file: Path) -> str | None:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy"):
            return None
    except (safetensors.SafetensorError, OSError) as error:
        return str(error)


def _matching(names: Collection[str], pattern: re.Pattern[str]) -> str | None:
    return next((name for name in sorted(names) if pattern.fullmatch(name)), None)
