"""The words of a sidecar: what it was made from and with, read without loading a tensor."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from kvq_formats.config import KVQConfig
from kvq_formats.errors import SidecarError
from kvq_formats.parameters import LayerStatistics
from kvq_formats.records import BaseModelRecord, CalibrationRecord

FORMAT_VERSION = 1

TENSORS_FILE = "kvq.safetensors"
CONFIG_FILE = "kvq_config.json"
CARD_FILE = "README.md"

HASH_FIELD = "document_sha256"

MAX_HEADER_BYTES = 100_000_000
"""safetensors refuses longer headers; so a first word that asks for more is no safetensors file."""

logger = logging.getLogger(__name__)


class SidecarHeader(BaseModel):
    """The JSON of a sidecar, format 1 (``docs/sidecar-format.md``).

    Fields:
        format_version: of the files; apart from the version of the package.
        kvq_version: the package that wrote them.
        config, base_model, calibration, statistics, rotary_channels: as in ``Sidecar``.
        effective_bits: at 32,768 tokens (see ``effective_bits``).
        tensors_sha256: of names, dtypes, shapes and bytes (see ``sidecar_tensors``).

    The JSON has one field more, ``document_sha256``, which covers the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    kvq_version: str
    config: KVQConfig
    base_model: BaseModelRecord
    calibration: CalibrationRecord
    statistics: dict[int, LayerStatistics]
    effective_bits: dict[str, float | int]
    tensors_sha256: str
    rotary_channels: dict[int, tuple[int, int]] = {}

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON with sorted keys and its hash; the same header always gives the same text."""
        document = self.model_dump()
        # Hashed as a reader will see it: the layers' indices are strings there.
        document[HASH_FIELD] = document_sha256(json.loads(json.dumps(document, allow_nan=False)))
        return json.dumps(document, indent=indent, sort_keys=True, allow_nan=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read the header of a sidecar, a folder or its ``kvq.safetensors``; see ``locate``.

        One warning is logged if there are keys that this version does not know. Raises
        SidecarError if the file is missing, truncated, altered, not a sidecar, or of a newer
        format.
        """
        file = locate(path)
        document = _document(file)
        # The hash comes before the comparison, so that the file that was altered is the one named.
        _check_hash(file, document)
        _compare_with_readable(file, document)
        unknown = sorted(set(document) - {*cls.model_fields, HASH_FIELD})
        if unknown:
            logger.warning("%s: ignoring keys unknown to this version: %s", file, unknown)
        config = document.get("config")
        if isinstance(config, dict):
            # Files from before there were error feedback and a margin.
            config.setdefault("feedback", False)
            config.setdefault("range_margin", 1.0)
        try:
            return cls.model_validate({k: document[k] for k in cls.model_fields if k in document})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise altered(file, f"its field {name}: {first['msg'].lower()}") from error


def document_sha256(document: dict[str, Any]) -> str:
    """SHA-256 of a header's JSON as it was parsed, without the hash itself, in hexadecimal."""
    hashed = {key: value for key, value in document.items() if key != HASH_FIELD}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def locate(path: str | os.PathLike[str]) -> Path:
    """The safetensors file of a sidecar given as a folder or a file; raises SidecarError."""
    given = Path(path).expanduser()
    try:
        if given.is_dir():
            if (given / TENSORS_FILE).is_file():
                return given / TENSORS_FILE
            kind = "a model" if (given / "config.json").exists() else "no sidecar"
            raise SidecarError(
                f"{given} is not a sidecar: it has no {TENSORS_FILE} and holds {kind}.",
                hint=f"kvq calibrate MODEL -o {given} makes one in an empty folder",
            )
        if given.is_file():
            return given
    except PermissionError as error:
        raise SidecarError(f"{given} cannot be read: permission denied.") from error
    raise SidecarError(f"there is no sidecar at {given}.", hint=f"kvq calibrate MODEL -o {given}")


def altered(file: Path, what: str) -> SidecarError:
    """The error for a sidecar whose content cannot be what kvq wrote."""
    return SidecarError(
        f"{file} is damaged or was altered: {what}.",
        hint="copy or download it again, or calibrate again with --overwrite",
    )


def _document(file: Path) -> dict[str, Any]:
    """The JSON object in the metadata of a safetensors file, after every check of its frame."""
    metadata = _read_safetensors_header(file).get("__metadata__", {})
    if "kvq_format" not in metadata:
        raise SidecarError(
            f"{file} is a safetensors file but no kvq sidecar: its metadata has no kvq_format.",
            hint="kvq calibrate MODEL -o DIR makes a sidecar",
        )
    try:
        version = int(metadata["kvq_format"])
        document = _parse(metadata.get("kvq_config", ""))
    except ValueError as error:
        raise altered(file, "its metadata cannot be read") from error
    if version > FORMAT_VERSION:
        writer = document.get("kvq_version")
        raise SidecarError(
            f"{file} has format {version}, written by kvq {writer}; this kvq reads formats up to "
            f"{FORMAT_VERSION}.",
            hint=f'pip install --upgrade "kvq>={writer}"' if writer else "pip install -U kvq",
        )
    if version != FORMAT_VERSION or document.get("format_version") != version:
        raise altered(file, f"format {version} and {document.get('format_version')} were found")
    return document


def _check_hash(file: Path, document: dict[str, Any]) -> None:
    if HASH_FIELD not in document:
        raise altered(file, f"its field {HASH_FIELD} is missing")
    if document[HASH_FIELD] != document_sha256(document):
        raise altered(file, "the hash of its configuration is not the one that it states")


def _read_safetensors_header(file: Path) -> dict[str, Any]:
    # Eight bytes give the length of a JSON header, the tensors follow. Read here, because the
    # library's messages do not say what is wrong with a file, only that something is.
    no_safetensors = SidecarError(
        f"{file} is not a safetensors file.", hint=f"--sidecar takes a folder or {TENSORS_FILE}"
    )
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES:
                raise altered(file, "it is empty") if size == 0 else no_safetensors
            text = stream.read(length)
    except OSError as error:
        raise SidecarError(f"{file} cannot be read: {error.strerror or error}.") from error
    if len(text) < length:
        if not text.startswith(b'{"__metadata__'):
            raise no_safetensors
        raise altered(file, f"it is truncated within its header, at {size} bytes")
    try:
        header = _parse(text)
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=0,
        )
        expected = 8 + length + int(end)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise no_safetensors from error
    if size != expected:
        raise altered(file, f"it has {size} bytes, expected {expected}")
    return header


def _parse(text: str | bytes) -> dict[str, Any]:
    document = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(document, dict):
        raise ValueError("expected an object")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _compare_with_readable(file: Path, document: dict[str, Any]) -> None:
    """Refuse a readable JSON that tells people something else than what is used."""
    readable = file.with_name(CONFIG_FILE)
    if file.name != TENSORS_FILE or not readable.exists():
        return
    try:
        copy = _parse(readable.read_bytes())
    except (OSError, ValueError) as error:
        raise altered(readable, "it is not valid JSON") from error
    if (difference := _first_difference(copy, document)) is not None:
        raise SidecarError(
            f"{readable} was altered: {difference} in {TENSORS_FILE}, which is what counts.",
            hint=f"delete {readable} ({TENSORS_FILE} is complete by itself), or restore it",
        )


def _first_difference(copy: Any, original: Any, name: str = "") -> str | None:
    if isinstance(copy, dict) and isinstance(original, dict):
        for key in sorted({*copy, *original}):
            inner = _first_difference(copy.get(key), original.get(key), f"{name}.{key}".strip("."))
            if inner is not None:
                return inner
        return None
    return None if copy == original else f"{name} is {copy!r}, but {original!r}"
