"""Calibration of a model that is spread over devices: each layer where it lies, and the same bytes.

The devices are pretended (``support/labelled_devices.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.pipeline import calibrate
from kvq_calibration.points import NormalisedPoints
from kvq_calibration.thresholds import ChannelQuantiles
from kvq_formats.config import KVQConfig
from kvq_formats.sidecar import Sidecar
from labelled_devices import labelled_devices
from spread_models import layer_devices, spread
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

WINDOWS = torch.randint(3, 190, (4, 48), generator=torch.Generator().manual_seed(5))


def run(model: PreTrainedModel, sensitivity: str) -> Sidecar:
    origin = make_sidecar(model=model)
    return calibrate(
        model,
        WINDOWS,
        KVQConfig.create(key_bits=3, value_bits=2, sensitivity=sensitivity),
        base_model=origin.base_model,
        calibration=origin.calibration,
        batch_size=2,
    )


class Seen:
    """Devices that the quantiles and histograms of each layer were fed from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[type, dict[int, set[torch.device]]] = {}
        # Numbers of objects are not used twice while these are alive.
        self.alive: list[Any] = []
        for kind in (ChannelQuantiles, NormalisedPoints):
            self.follow(kind, monkeypatch)

    def follow(self, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
        seen, stock = self.of.setdefault(kind, {}), kind.add

        def add(holder: Any, *given: Tensor | None) -> None:
            self.alive.append(holder)
            devices = {x.device for x in given if x is not None}
            seen.setdefault(id(holder), set()).update(devices)
            stock(holder, *given)

        monkeypatch.setattr(kind, "add", add)

    def devices(self, kind: type) -> list[set[torch.device]]:
        """In the order in which they were fed first."""
        return list(self.of[kind].values())


@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
def test_each_layer_is_measured_where_it_lies(
    sensitivity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_llama(num_hidden_layers=3)
    expected = run(model, sensitivity)
    seen = Seen(monkeypatch)
    with labelled_devices():
        scattered = spread(model, 3)
        found = run(scattered, sensitivity)
        where = layer_devices(scattered)
    assert len(set(where)) == 3
    assert found._files() == expected._files()
    assert seen.devices(ChannelQuantiles) == [{device} for device in where]
    # Of keys, then of values. What is kept of tokens lies on the CPU, where codebooks are fitted.
    fed = [{device} for device in where for _ in range(2)]
    assert seen.devices(NormalisedPoints)[: len(fed)] == fed
    assert all(kept == {torch.device("cpu")} for kept in seen.devices(NormalisedPoints)[len(fed) :])
