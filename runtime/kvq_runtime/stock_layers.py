"""The layers of a stock cache: what transformers calls each, and what it makes it of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


def types_and_options(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """One name and the options of one layer class for each layer of the decoder.

    Raises AttributeError, KeyError or TypeError where transformers makes no cache of layers for the
    model.
    """
    types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if isinstance(options, Mapping):
        # Before transformers 5.19 all layers share them, and each takes what it needs.
        options = [options] * len(types)
    return list(types), [dict(given) for given in options]
