"""Weights in fewer bits than they compute in: loaded so by transformers, or stored so already.

kvq quantizes the cache and leaves weights alone. Where they are what does not fit, bitsandbytes
holds them in 4 or 8 bits through transformers' own configuration.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, cast, get_args

from kvq_formats.errors import ConfigError, KVQError, ModelError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig

    from kvq_runtime.resolve import ResolvedModel

LoadIn = Literal["4bit", "8bit"]

FLAGS: dict[LoadIn, str] = {"4bit": "--load-in-4bit", "8bit": "--load-in-8bit"}

_PIP = re.compile(r"pip install (?:-U |--upgrade )?(?:'[^']+'|\"[^\"]+\"|[^\s`)]+)")
"""The command that transformers' messages name, without options that matter only to them."""


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """How the weights of a model are stored quantized, as transformers names it; None if not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    given = stored if isinstance(stored, dict) else stored.to_dict()
    # bitsandbytes' configurations are older than the name.
    method = given.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def check_load_in(load_in: str | None) -> LoadIn | None:
    """``load_in`` itself; raises ConfigError for a width that there is not."""
    if load_in is not None and load_in not in get_args(LoadIn):
        raise ConfigError(
            f"load_in is {load_in!r}, expected '4bit', '8bit' or None.",
            hint=" or ".join(FLAGS.values()),
        )
    return cast(LoadIn | None, load_in)


def bitsandbytes_config(resolved: ResolvedModel, load_in: str | None) -> BitsAndBytesConfig | None:
    """What ``from_pretrained`` takes to hold the weights in 4 bits (NF4) or 8; None for neither.

    Raises ConfigError for another width, for weights that are stored quantized, and where
    bitsandbytes is not installed.
    """
    width = check_load_in(load_in)
    if width is None:
        return None
    flag = FLAGS[width]
    if (method := stored_quantization(resolved.config)) is not None:
        raise ConfigError(
            f"the weights of {resolved.record.id} are stored quantized ({method}); {flag} would "
            "quantize them once more.",
            hint=f"leave {flag} out, or take the model that they were made from",
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{flag} needs bitsandbytes, which is not installed.", hint="pip install bitsandbytes"
        )
    import torch
    from transformers import BitsAndBytesConfig

    if width == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def install_hint(error: ImportError) -> str:
    """The command that installs what a library misses, as its message names it."""
    named = _PIP.search(str(error))
    return named[0] if named else "install it into the environment of kvq"


def explain_quantization_error(
    error: BaseException, resolved: ResolvedModel, load_in: str | None
) -> KVQError | None:
    """The sentence for quantized weights that cannot be loaded here; None if they are not."""
    from kvq_runtime.model_errors import first_line

    method = stored_quantization(resolved.config)
    if load_in is None and method is None:
        return None
    subject = f"the weights of {resolved.record.id} are " + (
        f"stored quantized ({method})" if load_in is None else f"to be held in {load_in[0]} bits"
    )
    if "dispatched on the CPU or the disk" in str(error):
        fewer = f"{FLAGS['4bit']}, or " if load_in == "8bit" else ""
        return ModelError(
            f"{subject} and do not fit into the GPUs' memory; bitsandbytes does not compute with "
            "weights that are offloaded to the host or the disk.",
            hint=f"{fewer}a smaller model, or --device-map auto with weights in 16 bits",
        )
    if isinstance(error, ImportError):
        return ModelError(
            f"{subject}, for which a package is missing: {first_line(error)}",
            hint=install_hint(error),
        )
    if isinstance(error, RuntimeError | ValueError):
        return ModelError(
            f"{subject}, and transformers cannot load them here: {first_line(error)}",
            hint="weights that are not quantized, or another --device-map",
        )
    return None
