from __future__ import annotations

import logging

import pytest
import torch

from kvq_formats.errors import ConfigError, KVQError
from kvq_runtime.attach import attach
from kvq_runtime.implementation import choose_implementation
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

CPU = torch.device("cpu")


@pytest.mark.parametrize("requested", [None, "reference"])
def test_a_cpu_runs_the_reference(requested: str | None) -> None:
    chosen = choose_implementation(CPU, requested)
    assert (chosen.name, chosen.reason) == ("reference", "torch on cpu")


def test_a_gpu_runs_the_reference_and_says_why() -> None:
    chosen = choose_implementation(torch.device("cuda:1"))
    assert chosen.name == "reference"
    assert chosen.reason == "torch on cuda:1; there are no Triton kernels yet"


@pytest.mark.parametrize(
    ("has_gpu", "words"), [(False, "need a CUDA"), (True, "no Triton kernels")]
)
def test_triton_is_never_swapped_for_the_reference(
    has_gpu: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(KVQError, match=words) as caught:
        choose_implementation(CPU, "triton")
    assert caught.value.hint == "--impl reference (slow, exact)"


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="'cuda', expected reference or triton"):
        choose_implementation(CPU, "cuda")


@pytest.mark.parametrize("rule", ["runtime", "evaluation", "exact-prefill"])
def test_attach_refuses_what_cannot_run_under_every_rule(rule: str) -> None:
    model = make_tiny_llama()
    with (
        pytest.raises(KVQError, match="Triton"),
        attach(model, make_sidecar(), rule=rule, impl="triton"),  # type: ignore[arg-type]
    ):
        pass


def test_attach_says_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvq_runtime"), attach(make_tiny_llama(), make_sidecar()):
        assert "reference (torch on cpu)" in caplog.text
