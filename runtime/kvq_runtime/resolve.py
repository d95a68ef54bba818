"""Find a model and say at once what is wrong with it, before any weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq_formats.errors import ConfigError, ModelError
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord
from kvq_runtime.embedded import EMBEDDED_MODEL_ID, embedded_model_path
from kvq_runtime.hub import (
    cached_commit,
    cached_files,
    explain_hub_error,
    is_hub_id,
    is_offline,
    is_reachable,
    not_cached,
    repository_files,
)
from kvq_runtime.model_errors import explain_config_error
from kvq_runtime.model_files import check_files, check_repository_name, check_weights, is_complete
from kvq_runtime.quiet import quiet_transformers
from kvq_runtime.supported_models import (
    check_supported,
    context_limit,
    quantized_layers,
    text_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found and that kvq understands; no weights are loaded.

    Fields:
        location: what transformers loads it by, a Hub id or a folder.
        is_local: whether it is a folder.
        config: its configuration, as transformers reads it.
        record: what a sidecar will say of it.
        trust_remote_code: whether code from its repository may run.
        local_files_only: the Hub cannot be reached or may not be asked; the cache must do.
        notes: what the user should know.
    """

    location: str
    is_local: bool
    config: PreTrainedConfig
    record: BaseModelRecord
    trust_remote_code: bool = False
    local_files_only: bool = False
    notes: tuple[str, ...] = ()

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model was made for; None if its configuration does not say."""
        positions = text_config(self.config).get("max_position_embeddings")
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def context_limit(self) -> int | None:
        """Tokens that a quantized cache can serve; None without such a limit."""
        return context_limit(self.config)

    @property
    def source(self) -> dict[str, Any]:
        """The arguments by which every ``from_pretrained`` gets the same commit."""
        return {
            "pretrained_model_name_or_path": self.location,
            "revision": self.record.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.local_files_only,
        }


def resolve_model(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    record_id: str | None = None,
) -> ResolvedModel:
    """Find a model and check all that can be checked without its weights.

    Args:
        name: a folder, ``org/name`` or ``org/name@revision``. None and ``EMBEDDED_MODEL_ID`` both
            mean the embedded model.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: let code from the repository run, for models that transformers does not
            know.
        record_id: the id that sidecars shall give. Without it: the Hub id, or the absolute path of
            a folder, because the id is what finds the model again when no MODEL is given, and a
            bare folder name would be looked for on the Hub. The model card, which is what people
            share, gives the folder's name only.

    Raises:
        ModelError: it cannot be found, read or downloaded.
        UnsupportedModelError: it is not a causal language model, or has attention that kvq does
            not understand.
        ConfigError: two different revisions, or one for a folder.
    """
    if name is None or name == EMBEDDED_MODEL_ID:
        name, record_id = embedded_model_path(), record_id or EMBEDDED_MODEL_ID
    given = os.fspath(name)
    path = Path(given).expanduser()
    if given.strip() and path.exists():
        return _resolve_folder(path, revision, trust_remote_code, record_id)
    return _resolve_repository(given, revision, trust_remote_code, record_id)


def _resolve_folder(
    path: Path, revision: str | None, trust_remote_code: bool, record_id: str | None
) -> ResolvedModel:
    if revision is not None:
        raise ConfigError(
            f"{path} is a folder and has no revision {revision!r}.", hint="leave --revision out"
        )
    location = os.path.abspath(path)
    if not path.is_dir():
        raise ModelError(
            f"{path} is a file; expected a folder with config.json, weights and tokenizer.",
            hint=f"MODEL {path.parent}, if that is the model",
        )
    try:
        names = os.listdir(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    check_files(names, name=str(path), is_local=True)
    config = _read_config(
        location, None, trust_remote_code=trust_remote_code, local_files_only=True
    )
    check_supported(config, name=record_id or str(path))
    check_weights(path)
    return ResolvedModel(
        location=location,
        is_local=True,
        config=config,
        record=_record(config, record_id or location, None),
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        notes=_left_out(config),
    )


def _resolve_repository(
    given: str, revision: str | None, trust_remote_code: bool, record_id: str | None
) -> ResolvedModel:
    repo_id, _, in_name = given.partition("@")
    if not is_hub_id(repo_id):
        raise ModelError(
            f"there is no folder {given!r}, and it is not a Hub id.",
            hint="MODEL is org/name, org/name@revision, or a folder",
        )
    if in_name and revision not in (None, in_name):
        raise ConfigError(
            f"two revisions were given: {in_name!r} after the @ and {revision!r}.",
            hint="--revision or @, not both",
        )
    revision = revision or in_name or None
    check_repository_name(repo_id)
    local_files_only = is_offline() or not is_reachable()
    config = _read_config(
        repo_id, revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only
    )
    check_supported(config, name=repo_id)
    commit = cached_commit(repo_id, revision) or revision
    if not is_complete(cached_files(repo_id, revision=commit)):
        if local_files_only:
            raise not_cached(repo_id, subject=f"the weights of {repo_id}", raises=ModelError)
        if names := repository_files(repo_id, revision=commit):
            check_files(names, name=repo_id, is_local=False)
    notes: tuple[str, ...] = ()
    if local_files_only and not is_offline():
        notes = (f"no network: the cached copy of {repo_id} is used.",)
    return ResolvedModel(
        location=repo_id,
        is_local=False,
        config=config,
        record=_record(config, record_id or repo_id, commit),
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only,
        notes=(*notes, *_left_out(config)),
    )


def _read_config(
    location: str, revision: str | None, *, trust_remote_code: bool, local_files_only: bool
) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    is_local = os.path.isdir(location)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                location,
                revision=revision,
                trust_remote_code=trust_remote_code,
                local_files_only=local_files_only,
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError, StrictDataclassError) as error:
        explained = (
            None
            if is_local
            else explain_hub_error(error, location, revision=revision, raises=ModelError)
        )
        if explained is None and "Unrecognized model" in str(error) and not is_local:
            # No config.json, or one of another library: what else is there decides what to say.
            names = repository_files(location, revision=revision)
            check_files(names, name=location, is_local=False)
        raise (explained or explain_config_error(error, location)) from error


def _left_out(config: PreTrainedConfig) -> tuple[str, ...]:
    count = Fingerprint.from_config(text_config(config)).num_hidden_layers
    if (limit := context_limit(config)) is not None:
        return (
            f"all {count} layers attend within a window of {limit:,} tokens: the packed cache "
            "serves texts of up to that length.",
        )
    left = count - len(quantized_layers(config))
    if not left:
        return ()
    return (
        f"{left} of {count} layers do not attend to the whole context; their cache does not grow "
        "and stays as it is.",
    )


def _record(config: PreTrainedConfig, id: str, commit: str | None) -> BaseModelRecord:
    return BaseModelRecord(
        id=id, revision=commit, fingerprint=Fingerprint.from_config(text_config(config))
    )
