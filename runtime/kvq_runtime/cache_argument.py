"""What transformers calls the cache of a forward: ``past_key_values``, from 5.24 on ``cache``.

From 5.24 on the older name still works, with a warning, but a forward hook sees the newer one. A
model that brings its own code may have kept the older name whatever the version is, so that a
forward's signature decides and not the version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE = "past_key_values"
"""The one name that kvq uses for it inside."""

RENAMED = "cache"


def cache_name(forward: Callable[..., Any]) -> str:
    """The name under which a forward takes its cache."""
    return RENAMED if RENAMED in inspect.signature(forward).parameters else CACHE


def with_one_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by name, the cache under ``CACHE`` however it was passed."""
    return {CACHE if name == RENAMED else name: value for name, value in arguments.items()}


def as_taken(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of ``with_one_name``: the cache under the name that ``forward`` takes."""
    name = cache_name(forward)
    return {name if given == CACHE else given: value for given, value in arguments.items()}


def returned_cache(output: Any) -> Any:
    """The cache in what a forward returned; None where it returned none."""
    return output.cache if hasattr(output, RENAMED) else output.past_key_values
