"""The model that is asked about: found, or found and with something wrong that is told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_cli.checks.check import Asked, Check
from kvq_formats.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from kvq_runtime.resolve import ResolvedModel


@dataclass(frozen=True)
class FoundModel:
    """A model of which at least something can be said.

    Fields:
        location: a folder, or a Hub id without its revision.
        is_local: whether it is a folder.
        revision: commit, or what was asked for; None for a folder.
        config: None where transformers cannot read it.
        resolved: as every other command sees it; None if it is not understood.
        error: what every other command would stop with.
    """

    location: str
    is_local: bool
    revision: str | None
    config: PreTrainedConfig | None
    resolved: ResolvedModel | None
    error: ModelError | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.resolved.record.id if self.resolved is not None else self.location

    @property
    def notes(self) -> tuple[str, ...]:
        """What every other command says of it, too."""
        return () if self.resolved is None else self.resolved.notes

    @property
    def folder(self) -> Path | None:
        """Where its files lie; None if nothing of it is in the cache."""
        if self.is_local:
            return Path(self.location)
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.location, "config.json", revision=self.revision)
        return Path(path).parent if isinstance(path, str) else None


def find_model(asked: Asked) -> FoundModel:
    """Find the model that is asked about, and keep what is wrong with it for the checks.

    Raises ModelError where it cannot be found or read at all, ConfigError as ``resolve_model``.
    """
    from kvq_runtime.resolve import resolve_model

    try:
        resolved = resolve_model(
            asked.model, revision=asked.revision, trust_remote_code=asked.trust_remote_code
        )
    except ModelError as error:
        if asked.model is None:
            raise
        return _with_error(asked.model, asked, error)
    return FoundModel(
        resolved.location, resolved.is_local, resolved.record.revision, resolved.config, resolved
    )


def check_configuration(found: FoundModel) -> Check:
    """Transformers reads the configuration; its shape."""
    name = "configuration"
    if found.config is None:
        assert found.error is not None
        return Check.failure(name, found.error)
    kind = f"{found.config.model_type}"
    if found.resolved is None:
        return Check(name, "pass", f"{kind}, read")
    shape = found.resolved.record.fingerprint
    return Check(
        name,
        "pass",
        f"{kind}: {shape.summary}, {shape.num_attention_heads} query heads, "
        + ("keys are normalised before RoPE" if shape.qk_norm else "no norm of keys"),
    )


def _with_error(model: str, asked: Asked, error: ModelError) -> FoundModel:
    """What can be said of a model that other commands refuse; else raise that error again."""
    path = Path(model).expanduser()
    is_local = path.exists()
    repo_id, _, in_name = model.partition("@")
    location = os.path.abspath(path) if is_local else repo_id
    revision = None if is_local else asked.revision or in_name or None
    config = _config(location, revision, asked.trust_remote_code)
    if config is None and not isinstance(error, UnsupportedModelError):
        raise error
    resolved = None
    if config is not None and not isinstance(error, UnsupportedModelError):
        resolved = _described(location, is_local, revision, config, asked.trust_remote_code)
    return FoundModel(location, is_local, revision, config, resolved, error)


def _described(
    location: str,
    is_local: bool,
    revision: str | None,
    config: PreTrainedConfig,
    trust_remote_code: bool,
) -> ResolvedModel | None:
    """What ``resolve_model`` would say if only the files were complete."""
    from kvq_formats.fingerprint import Fingerprint
    from kvq_formats.records import BaseModelRecord
    from kvq_runtime.resolve import ResolvedModel
    from kvq_runtime.supported_models import check_supported, text_config

    try:
        check_supported(config, name=location)
    except UnsupportedModelError:
        # Said by the check of its attention.
        return None
    shape = Fingerprint.from_config(text_config(config))
    record = BaseModelRecord(id=location, revision=revision, fingerprint=shape)
    return ResolvedModel(
        location, is_local, config, record, trust_remote_code, local_files_only=True
    )


def _config(location: str, revision: str | None, trusted: bool) -> PreTrainedConfig | None:
    """The configuration as it lies in the folder or in the cache; None if it cannot be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from kvq_runtime.quiet import quiet_transformers

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                location, revision=revision, trust_remote_code=trusted, local_files_only=True
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError, StrictDataclassError):
        return None
