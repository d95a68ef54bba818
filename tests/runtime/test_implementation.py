from __future__ import annotations

import logging

import pytest
import torch

from kvq_formats.errors import ConfigError, KVQError
from kvq_runtime import implementation
from kvq_runtime.attach import attach
from kvq_runtime.implementation import choose_implementation
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

CPU = torch.device("cpu")


@pytest.mark.parametrize("requested", [None, "reference"])
def test_a_cpu_runs_the_reference(requested: str | None) -> None:
    chosen = choose_implementation(CPU, requested)
    assert (chosen.name, chosen.reason) == ("reference", "torch on cpu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, as they are for users; the tests have them interpreted."""
    monkeypatch.setattr(implementation, "interprets", lambda: False)


@pytest.mark.parametrize("requested", [None, "triton"])
@pytest.mark.usefixtures("compiled")
def test_a_gpu_runs_kernels(requested: str | None) -> None:
    chosen = choose_implementation(torch.device("cuda:1"), requested)
    assert (chosen.name, chosen.reason) == ("triton", "kernels on cuda:1")


def test_the_reference_runs_on_a_gpu_when_it_is_asked_for() -> None:
    chosen = choose_implementation(torch.device("cuda:1"), "reference")
    assert (chosen.name, chosen.reason) == ("reference", "torch on cuda:1")


@pytest.mark.usefixtures("compiled")
def test_triton_is_never_swapped_for_the_reference() -> None:
    with pytest.raises(KVQError, match="need a CUDA or ROCm GPU; the model is on cpu") as caught:
        choose_implementation(CPU, "triton")
    assert "--impl reference" in str(caught.value.hint)


@pytest.mark.parametrize(("device", "requested"), [("cuda", None), ("cpu", "triton")])
def test_triton_that_is_not_installed(
    device: str, requested: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "is_installed", lambda: False)
    with pytest.raises(KVQError, match="Triton is not installed") as caught:
        choose_implementation(torch.device(device), requested)
    assert "pip install 'triton>=3.6'" in str(caught.value.hint)


def test_kernels_are_interpreted_where_triton_was_told_to() -> None:
    chosen = choose_implementation(CPU, "triton")
    assert (chosen.name, chosen.reason) == ("triton", "kernels interpreted on cpu")


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="'cuda', expected reference or triton"):
        choose_implementation(CPU, "cuda")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rule", ["runtime", "evaluation", "exact-prefill"])
def test_attach_refuses_what_cannot_run_under_every_rule(rule: str) -> None:
    model = make_tiny_llama()
    with (
        pytest.raises(KVQError, match="Triton"),
        attach(model, make_sidecar(), rule=rule, impl="triton"),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize("rule", ["runtime", "exact-prefill"])
def test_attach_refuses_a_model_that_kernels_do_not_take(rule: str) -> None:
    """Before a token is read, not at the first kernel."""
    model = make_tiny_llama(hidden_size=68, num_attention_heads=17, num_key_value_heads=1)
    with (
        pytest.raises(KVQError, match="17 query heads share") as caught,
        attach(model, make_sidecar(model=model), rule=rule, impl="triton"),  # type: ignore[arg-type]
    ):
        pass
    assert "--impl reference" in str(caught.value.hint)


def test_attach_says_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvq_runtime"), attach(make_tiny_llama(), make_sidecar()):
        assert "reference (torch on cpu)" in caplog.text
