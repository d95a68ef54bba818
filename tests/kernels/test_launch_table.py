"""Which layers the fast path takes, and that every layer has a launch."""

from __future__ import annotations

from typing import Any

import pytest

from kvq_kernels.launch_table import DecodeLaunch, decode_launch

USUAL = {"bits": (3, 3), "head_dim": 128, "rotary_dim": 128, "group_size": 4}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (2, 3)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_usual_layers_are_fast(architecture: str, bits: tuple[int, int], head_dim: int) -> None:
    shape = {"head_dim": head_dim, "rotary_dim": head_dim, "group_size": 8}
    assert decode_launch(architecture, bits=bits, **shape) == DecodeLaunch("registers", 1, 8)


def test_small_multiprocessors_hold_less() -> None:
    for architecture in ("sm_86", "sm_89", "sm_120"):
        assert decode_launch(architecture, **USUAL).programs == 7


@pytest.mark.parametrize(
    "how",
    [
        {"head_dim": 80, "rotary_dim": 80},
        {"head_dim": 32, "rotary_dim": 32},
        {"rotary_dim": 64},
        {"group_size": 16},
        {"irregular": True},
    ],
)
def test_what_the_portable_path_takes(how: dict[str, Any]) -> None:
    assert decode_launch("sm_90", **{**USUAL, **how}) == DecodeLaunch("portable", 4, 2)


@pytest.mark.parametrize("architecture", ["sm_75", "gfx942", "gfx90a", "cpu"])
def test_other_devices_are_portable(architecture: str) -> None:
    assert decode_launch(architecture, **USUAL).path == "portable"
