"""All checks in order, each with what those before it have found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq_cli.checks.check import Asked, Check
from kvq_cli.checks.environment import check_imports, check_versions
from kvq_cli.checks.files import (
    check_download,
    check_sidecar_disk,
    check_tokenizer,
    check_weight_files,
)
from kvq_cli.checks.found_model import FoundModel, check_configuration, find_model
from kvq_cli.checks.layers import (
    LayerGroup,
    check_attention,
    check_drift,
    group_layers,
    layer_windows,
    rotated_channels,
)
from kvq_formats.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvq_cli.checks.cache_memory import CacheMemory
    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.examine import ExaminedLayer
    from kvq_runtime.resolve import ResolvedModel


@dataclass
class Diagnosis:
    """What was found.

    Fields:
        found: the model.
        checks: in the order in which they were made.
        layers: groups of layers that are alike; none where the model is not understood.
        cache: counted bytes of its cache; None where the model is not understood.
        numbers: bytes and the like of single checks, for programs.
    """

    found: FoundModel
    checks: list[Check] = field(default_factory=list)
    layers: list[LayerGroup] = field(default_factory=list)
    cache: CacheMemory | None = None
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        """Those that another command would trip over."""
        return [check for check in self.checks if check.status == "fail"]

    def add(self, *checks: Check | None) -> None:
        """Keep what was found; None stands for nothing to say."""
        self.checks += [check for check in checks if check is not None]


def diagnose(asked: Asked, *, output_folder: Path) -> Diagnosis:
    """Look at everything that can be looked at without weights.

    ``output_folder``: where a sidecar would be written. Raises ModelError where the model cannot be
    found or read at all, ConfigError for options that make no sense.
    """
    from kvq_runtime.models import target_device

    target_device(asked.device_map)
    diagnosis = Diagnosis(found := find_model(asked))
    diagnosis.add(check_versions(), check_imports(), check_configuration(found))
    weight_check, weights = check_weight_files(found)
    diagnosis.add(weight_check, check_tokenizer(found), check_download(found, weights))
    examined = _examined(diagnosis, asked)
    if examined is None:
        diagnosis.add(Check("memory", "note", "not counted: the model is not understood"))
    else:
        sidecar = _understood(diagnosis, asked, examined)
        _memory(diagnosis, asked, sidecar, weights_usable=weights.usable)
        check, size = check_sidecar_disk(sidecar, output_folder)
        diagnosis.add(check)
        diagnosis.numbers["sidecar_bytes"] = size
    diagnosis.numbers["download_bytes"] = weights.download_bytes if weights.missing else 0
    return diagnosis


def _examined(diagnosis: Diagnosis, asked: Asked) -> tuple[ExaminedLayer, ...] | None:
    """Try the model out; None, and a check that fails, where it is not understood."""
    from kvq_runtime.examine import examine

    found, error = diagnosis.found, diagnosis.found.error
    if found.config is None:
        return None
    try:
        if isinstance(error, UnsupportedModelError):
            raise error
        layers = examine(found.config, name=found.name, trust_remote_code=asked.trust_remote_code)
    except UnsupportedModelError as reason:
        diagnosis.add(Check.failure("attention", reason))
        return None
    return layers


def _understood(diagnosis: Diagnosis, asked: Asked, examined: tuple[ExaminedLayer, ...]) -> Sidecar:
    """Say what was found of the layers, and what kernels make of it; a sidecar of their shape."""
    from kvq_cli.checks.stand_in import stand_in
    from kvq_runtime.miniature import make_miniature

    model = diagnosis.found.resolved
    assert model is not None
    record = model.record
    channels = {
        layer.layer_idx: layer.rotary_channels
        for layer in examined
        if layer.rotary_channels is not None
    }
    miniature = make_miniature(
        model.config, name=record.id, trust_remote_code=asked.trust_remote_code
    )
    diagnosis.layers = group_layers(
        examined,
        rotated=rotated_channels(miniature, channels),
        windows=layer_windows(model.config),
        head_dim=record.fingerprint.head_dim,
    )
    diagnosis.add(check_attention(diagnosis.layers), check_drift(examined))
    sidecar = stand_in(record, asked.config, channels)
    _kernels(diagnosis, asked, sidecar, miniature)
    return sidecar


def _kernels(
    diagnosis: Diagnosis, asked: Asked, sidecar: Sidecar, miniature: PreTrainedModel
) -> None:
    from kvq_cli.checks.kernel_trial import check_kernel_trial
    from kvq_cli.checks.kernels import check_implementation, check_kernel_shape
    from kvq_runtime.models import first_device, target_device

    check, chosen = check_implementation(asked)
    runs = chosen is not None and chosen.name == "triton"
    shape = check_kernel_shape(sidecar, miniature, needed=runs)
    diagnosis.add(check, shape)
    if not runs or shape.status == "pass":
        device = first_device(target_device(asked.device_map))
        diagnosis.add(check_kernel_trial(miniature, sidecar, device, runs=runs))


def _memory(diagnosis: Diagnosis, asked: Asked, sidecar: Sidecar, *, weights_usable: bool) -> None:
    from kvq_cli.checks.cache_memory import count_cache, default_tokens
    from kvq_cli.checks.memory import check_calibration_memory, check_context, check_room

    model = diagnosis.found.resolved
    assert model is not None
    context = check_context(model, asked.context)
    diagnosis.add(context)
    tokens = asked.context or default_tokens(model)
    diagnosis.cache = count_cache(model, sidecar, diagnosis.layers, tokens)
    if not weights_usable and not _sizes_are_known(model, asked):
        diagnosis.add(Check("memory", "note", "not compared: the size of the weights is not known"))
        return
    room, diagnosis.numbers["room"] = check_room(model, sidecar, diagnosis.cache, asked)
    calibration, diagnosis.numbers["calibration"] = check_calibration_memory(model, asked)
    diagnosis.add(room, calibration)


def _sizes_are_known(model: ResolvedModel, asked: Asked) -> bool:
    """Whether the configuration alone tells what the weights take."""
    from kvq_runtime.weight_quantization import stored_quantization

    has_dtype = asked.dtype != "auto" or model.config.dtype is not None
    return has_dtype and stored_quantization(model.config) is None
