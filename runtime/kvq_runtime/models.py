"""Load a model and its tokenizer with transformers; see ``resolve`` for what comes before."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvq_formats.errors import ConfigError, ModelError
from kvq_formats.records import BaseModelRecord
from kvq_runtime.model_errors import (
    check_report,
    damaged_weights,
    explain_load_error,
    first_line,
    out_of_memory,
)
from kvq_runtime.model_files import has_tokenizer
from kvq_runtime.quiet import quiet_transformers
from kvq_runtime.resolve import ResolvedModel, resolve_model
from kvq_runtime.supported_models import quantized_layers
from kvq_runtime.weight_quantization import bitsandbytes_config, explain_quantization_error

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LoadedModel",
    "ResolvedModel",
    "first_device",
    "load_model",
    "load_tokenizer",
    "quantized_layers",
    "resolve_model",
    "target_device",
]

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in evaluation mode, and its tokenizer.

    Fields:
        model, tokenizer: as transformers loaded them.
        record: what a sidecar will say of the model.
        notes: what the user should know, those of resolving included.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: BaseModelRecord
    notes: tuple[str, ...] = ()


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises ModelError if it is missing or cannot be read."""
    from transformers import AutoTokenizer

    missing = ModelError(
        f"{resolved.location} has no tokenizer: expected tokenizer.json or the like.",
        hint="MODEL with one, or save one there: tokenizer.save_pretrained(DIR)",
    )
    if resolved.is_local and not has_tokenizer(os.listdir(resolved.location)):
        raise missing
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(**resolved.source)
    # The tokenizers library raises bare Exception for a file that it cannot understand.
    except Exception as error:
        if "backend tokenizer" in str(error):
            raise missing from error
        raise explain_load_error(error, resolved) or ModelError(
            f"the tokenizer of {resolved.record.id} cannot be read: {first_line(error)}",
            hint="copy or download its files again",
        ) from error


def load_model(
    resolved: ResolvedModel,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    load_in: str | None = None,
) -> LoadedModel:
    """Load weights and tokenizer of a model that ``resolve_model`` found.

    Args:
        resolved: the model.
        dtype: ``auto`` (as the weights were saved), ``bfloat16``, ``float16`` or ``float32``.
        device_map: a device, or ``auto`` and the like to spread it; without it the first GPU, or
            the CPU where there is none.
        attn_implementation: as transformers names it; its own choice without.
        trust_remote_code: in addition to what ``resolve_model`` was told.
        load_in: ``4bit`` or ``8bit`` holds the weights of linear layers so, by bitsandbytes; what
            is stored quantized loads as it is, without.

    Raises:
        ModelError: weights or tokenizer are missing, damaged, do not fit the configuration, or do
            not fit into memory.
        ConfigError: an option makes no sense on this machine, or with weights that are stored
            quantized.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}.", hint=f"--dtype {'|'.join(DTYPES)}")
    device = target_device(device_map)
    quantization = bitsandbytes_config(resolved, load_in)
    tokenizer = load_tokenizer(resolved)
    source = resolved.source
    source["trust_remote_code"] = resolved.trust_remote_code or trust_remote_code
    if quantization is not None:
        # Where there is one, transformers takes it for the model's own.
        source["quantization_config"] = quantization
    try:
        with quiet_transformers():
            # Weights of the wrong shape are reported below, by name, and not by transformers.
            model, report = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=dtype,
                device_map=device,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(resolved, dtype, device) from error
    except SafetensorError as error:
        raise damaged_weights(resolved, error) from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if "can't allocate memory" in str(error):
            raise out_of_memory(resolved, dtype, device) from error
        if attn_implementation is not None and _is_about_attention(error, attn_implementation):
            raise ConfigError(
                f"attn_implementation {attn_implementation!r} cannot be used: {first_line(error)}",
                hint="--attn-implementation sdpa, or eager",
            ) from error
        explained = explain_load_error(error, resolved)
        explained = explain_quantization_error(error, resolved, load_in) or explained
        if explained is None:
            raise
        raise explained from error
    check_report(report, resolved)
    return LoadedModel(model.eval(), tokenizer, resolved.record, resolved.notes)


def target_device(device_map: str | None) -> str:
    """Where the weights go: a device, or how to spread them over several.

    Raises ConfigError for what is no device, or is not in this machine.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device_map is None:
        return "cuda" if has_gpu else "cpu"
    if device_map in DEVICE_MAPS:
        return device_map
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise ConfigError(
            f"device_map {device_map!r} is no device.",
            hint=f"--device-map cpu, cuda, cuda:1, or {', '.join(DEVICE_MAPS)}",
        ) from error
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device_map is {device_map!r}, but this machine has {torch.cuda.device_count()} GPUs "
            "that torch can use.",
            hint="--device-map cpu, or leave it out",
        )
    return device_map


def first_device(place: str) -> torch.device:
    """The device that ``target_device`` named, or the first of those that it spreads over."""
    import torch

    if place in DEVICE_MAPS:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(place)


def _is_about_attention(error: BaseException, attn_implementation: str) -> bool:
    words = ("attn_implementation", "Attention", "attention implementation", "kernels")
    return attn_implementation in str(error) or any(word in str(error) for word in words)
