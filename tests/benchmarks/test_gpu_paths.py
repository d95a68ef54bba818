"""Which path a timed decode step takes is chosen from outside, and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_paths import launch_of, path_of, portable, portably

from kvq_kernels import decode as decode_module
from kvq_kernels.launch_table import DecodeLaunch

LAYER: dict[str, Any] = {"bits": (3, 3), "head_dim": 128, "rotary_dim": 128, "group_size": 4}


def test_portable_whatever_the_device_and_only_inside() -> None:
    def path() -> str:
        return decode_module.decode_launch("sm_90", **LAYER).path

    assert path() == "registers"
    with portable():
        assert path() == "portable"
    with pytest.raises(ZeroDivisionError), portable():
        _ = 1 / 0
    assert path() == "registers"


def test_the_path_of_a_step_is_seen() -> None:
    def step() -> torch.Tensor:
        # As ``decode`` asks, on a device of the fast path.
        launch: DecodeLaunch = decode_module.decode_launch("sm_90", **LAYER)
        return torch.tensor(launch.warps)

    assert path_of(step)[0] == "registers"
    assert step() == 1
    assert portably(step)() == 4


def test_the_launch_of_the_main_kernel_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, dict[str, Any]]] = []

    class Kernel:
        arg_names = ("lengths", "H")

        def __getitem__(self, grid: Any) -> Any:
            return lambda **given: launched.append((grid, given))

    def step() -> torch.Tensor:
        decode_module.fast_kernels()[1][2, 3, 1](lengths=7, H=3, num_warps=1)
        return torch.zeros(1)

    kernel = Kernel()
    monkeypatch.setattr(decode_module, "fast_kernels", lambda: (None, kernel, None))
    found = launch_of(step)
    assert found is not None
    assert decode_module.fast_kernels()[1] is kernel
    found.again(kernel, lengths=8)()
    assert launched == [
        ((2, 3, 1), {"lengths": 7, "H": 3, "num_warps": 1}),
        ((2, 3, 1), {"lengths": 8, "H": 3, "num_warps": 1}),
    ]
    assert launch_of(lambda: torch.zeros(1)) is None
