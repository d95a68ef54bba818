"""Which layers the fast path takes, and that every layer has a launch."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from kvq_formats.errors import ConfigError, KVQError
from kvq_kernels import decode
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


def test_the_portable_path_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_DECODE_PATH", "portable")
    assert decode_launch("sm_90", **USUAL).path == "portable"
    monkeypatch.setenv("KVQ_DECODE_PATH", "auto")
    assert decode_launch("sm_90", **USUAL).path == "registers"
    monkeypatch.setenv("KVQ_DECODE_PATH", "fast")
    with pytest.raises(ConfigError, match="KVQ_DECODE_PATH is 'fast', expected auto or portable"):
        decode_launch("sm_90", **USUAL)


def test_a_triton_without_what_the_fast_path_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvq_kernels.nvidia.decode_pages", None)
    with pytest.raises(KVQError, match="do not load with Triton") as caught:
        decode.fast_kernels()
    assert "KVQ_DECODE_PATH=portable" in str(caught.value.hint)


@pytest.mark.parametrize("architecture", ["sm_75", "gfx942", "gfx90a", "cpu"])
def test_other_devices_are_portable(architecture: str) -> None:
    assert decode_launch(architecture, **USUAL).path == "portable"
