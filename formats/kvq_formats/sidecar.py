"""The sidecar: all that a quantized cache needs beside its model, in one small folder.

The files are described in ``docs/sidecar-format.md``. ``kvq.safetensors`` is complete by itself;
``kvq_config.json`` and ``README.md`` repeat it for people.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Self

from kvq_formats.atomic import check_folder, write_folder
from kvq_formats.config import KVQConfig
from kvq_formats.model_card import model_card
from kvq_formats.parameters import LayerParameters, LayerStatistics
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar_header import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSORS_FILE,
    SidecarHeader,
    altered,
    locate,
)

REPORTED_TOKENS = 32_768
"""Length at which the effective bits of a sidecar are stated."""

MARKERS = (TENSORS_FILE, CONFIG_FILE)
"""Files by which a folder is known to hold a sidecar that may be replaced."""


# Comparing tensors gives tensors, so two sidecars are compared by their files.
@dataclass(frozen=True, eq=False)
class Sidecar:
    """What calibration learned of a model.

    Fields:
        config: the options that it was made with; one layer's widths are ``config.for_layer``.
        base_model: the model that was measured.
        calibration: the text that it was measured on.
        layers: parameters by layer_idx; a layer that is not here keeps its own cache.
        statistics: what the codebooks cost, of the same layers.
        rotary_channels: channels ``[start, stop)`` of a key that its layer hands to the model's
            rotary function; (0, 0) for layers without RoPE. A layer that is not here: all.
    """

    config: KVQConfig
    base_model: BaseModelRecord
    calibration: CalibrationRecord
    layers: dict[int, LayerParameters]
    statistics: dict[int, LayerStatistics]
    rotary_channels: dict[int, tuple[int, int]] = field(default_factory=dict)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder whole or not at all, and return its absolute path.

        The same sidecar always gives the same bytes. Raises OutputError if the folder holds
        anything (with ``overwrite``: anything but a sidecar, whose three files are replaced while
        other files stay) or cannot be written.
        """
        return write_folder(directory, self._files(), markers=MARKERS, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a sidecar, a folder or its ``kvq.safetensors``, tensors on the CPU.

        Raises SidecarError if it is missing, truncated, altered, not a sidecar, or of a newer
        format. Whether it fits a model is another question: ``fingerprint.check``.
        """
        import safetensors
        from safetensors.torch import load_file

        from kvq_formats.sidecar_tensors import (
            DamagedTensorsError,
            layers_from_tensors,
            tensors_sha256,
        )

        file = locate(path)
        header = SidecarHeader.read(file)
        try:
            tensors = load_file(file)
            layers = layers_from_tensors(tensors, header.config, header.base_model.fingerprint)
        except (safetensors.SafetensorError, DamagedTensorsError) as error:
            raise altered(file, str(error)) from error
        if tensors_sha256(tensors) != header.tensors_sha256:
            raise altered(file, "the hash of its tensors is not the one that it states")
        if set(layers) != set(header.statistics):
            raise altered(file, "its statistics are of other layers than its tensors")
        head_dim = header.base_model.fingerprint.head_dim
        for layer_idx, (start, stop) in header.rotary_channels.items():
            if layer_idx not in layers or not 0 <= start <= stop <= head_dim:
                raise altered(
                    file, f"layer {layer_idx} rotates channels {start} to {stop} of {head_dim}"
                )
        return cls(
            config=header.config,
            base_model=header.base_model,
            calibration=header.calibration,
            layers=layers,
            statistics=dict(header.statistics),
            rotary_channels=dict(header.rotary_channels),
        )

    @staticmethod
    def peek(path: str | os.PathLike[str]) -> SidecarHeader:
        """Read everything but the tensors. Raises as ``load`` does."""
        return SidecarHeader.read(path)

    def _files(self) -> dict[str, bytes]:
        from safetensors.torch import save

        from kvq_formats.effective_bits import effective_bits
        from kvq_formats.sidecar_tensors import layer_tensors, tensors_sha256

        tensors = layer_tensors(self.layers)
        fingerprint = self.base_model.fingerprint
        header = SidecarHeader(
            format_version=FORMAT_VERSION,
            kvq_version=version("kvq"),
            config=self.config,
            base_model=self.base_model,
            calibration=self.calibration,
            statistics=dict(sorted(self.statistics.items())),
            effective_bits=effective_bits(
                self.config,
                num_kv_heads=fingerprint.num_kv_heads,
                head_dim=fingerprint.head_dim,
                tokens=REPORTED_TOKENS,
            ).to_json(),
            tensors_sha256=tensors_sha256(tensors),
            rotary_channels=dict(sorted(self.rotary_channels.items())),
        )
        metadata = {
            "format": "pt",
            "kvq_format": str(FORMAT_VERSION),
            "kvq_config": header.to_json(),
        }
        return {
            TENSORS_FILE: _with_metadata(save(tensors), metadata),
            CONFIG_FILE: (header.to_json(indent=2) + "\n").encode(),
            CARD_FILE: model_card(header).encode("utf-8", "backslashreplace"),
        }


def check_output_directory(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Say whether a sidecar can be saved there, before the costly work starts.

    Creates nothing; returns the absolute path. Raises OutputError as ``Sidecar.save`` would.
    """
    return check_folder(directory, markers=MARKERS, overwrite=overwrite)


def _with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file with metadata put into its header.

    safetensors sorts tensors, but writes metadata in an order that changes from process to
    process; so it writes the file without, and the header is completed here. A header is JSON,
    filled up with spaces to a multiple of 8 bytes, after its length as a little-endian u64.
    """
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
