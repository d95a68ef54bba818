"""Every error that a user can cause. Anything else keeps its traceback.

A message says what was wrong, what was found and what was expected; the hint is the command or flag
that mends it. The command line prints both and leaves with ``exit_code``.
"""

from __future__ import annotations


class KVQError(Exception):
    """An expected failure: ``message`` says what and why, ``hint`` how to mend it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(KVQError):
    """An option or a combination of options that makes no sense (exit code 2, as for usage)."""

    exit_code = 2


class ModelError(KVQError):
    """A model that cannot be found, read or downloaded."""


class UnsupportedModelError(ModelError):
    """A model whose attention or cache kvq does not understand."""


class DataError(KVQError):
    """Text that is missing, unreadable, empty or too short."""


class SidecarError(KVQError):
    """A sidecar that is missing, truncated, altered, or of a newer format."""


class FingerprintMismatchError(SidecarError):
    """A sidecar that was calibrated for another model."""


class OutputError(KVQError):
    """A result that cannot be written: the folder exists, the disk is full, no permission."""


class CalibrationError(KVQError):
    """A measurement that cannot be used: NaN activations, a layer that was never called."""


class CacheFullError(KVQError):
    """More tokens than the cache was made for."""


class NotEnoughMemoryError(KVQError):
    """A run that cannot fit: found out before anything is allocated."""


class GateMissedError(KVQError):
    """The command ran, but a bar that the user set was missed."""

    exit_code = 3
