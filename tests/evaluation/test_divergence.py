from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvq_evaluation import divergence
from kvq_evaluation.divergence import token_metrics

U = 2.0**-24
"""Unit roundoff of f32."""


def logits_pair(tokens: int, vocabulary: int, *, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(tokens, vocabulary, generator=generator) * scale
    return p, p + torch.randn(tokens, vocabulary, generator=generator) * 0.3 * scale


def labels_of(tokens: int, vocabulary: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (tokens,), generator=generator)


def direct(p: Tensor, q: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """nll and KL by their definitions, all in f64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    nll = -log_q[torch.arange(len(labels)), labels]
    return nll, (log_p.exp() * (log_p - log_q)).sum(-1)


def spans(p: Tensor, q: Tensor) -> tuple[float, float]:
    """Widest range of a row and largest difference: what the error bound is made of."""
    both = torch.cat([p, q]).float()
    reach = (both.amax(-1) - both.amin(-1)).max()
    return float(reach), float((p.float() - q.float()).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_matches_the_direct_formula(dtype: torch.dtype, scale: float) -> None:
    p, q = (x.to(dtype) for x in logits_pair(40, 300, scale=scale, seed=1))
    labels = labels_of(40, 300)
    metrics = token_metrics(p, q, labels)
    nll, kl = direct(p, q, labels)
    reach, largest = spans(p, q)
    # An exponential of x - max is off by U * |x - max| from the subtraction and 2 U of its own; the
    # log-partition and each probability inherit that, differences and products add 2 U.
    assert (metrics.kl - kl).abs().max() <= 2 * U * (reach + 4) * (1 + largest)
    assert (metrics.nll - nll).abs().max() <= U * (reach + 4)
    assert torch.equal(metrics.agrees, p.argmax(-1) == q.argmax(-1))
    assert metrics.nll.dtype == metrics.kl.dtype == torch.float64


def test_identical_logits_diverge_by_nothing() -> None:
    p, _ = logits_pair(64, 500, scale=5.0, seed=2)
    metrics = token_metrics(p, p.clone(), labels_of(64, 500))
    assert torch.equal(metrics.kl, torch.zeros(64, dtype=torch.float64))
    assert metrics.agrees.all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.integers(-64, 64))
def test_shifted_logits_are_the_same_distribution(seed: int, shift: int) -> None:
    # Logits on a grid of 1/256 below 2**15: adding an integer is exact in f32.
    p, q = (x.mul(256).round().div(256) for x in logits_pair(3, 50, scale=4.0, seed=seed))
    labels = labels_of(3, 50, seed=seed)
    plain, shifted = token_metrics(p, q, labels), token_metrics(p, q + shift, labels)
    # max and top + log(sum) move by the shift exactly up to f64; (p - q) is summed with it.
    reach, largest = spans(p, q + shift)
    assert (plain.kl - shifted.kl).abs().max() <= 4 * U * (reach + 4) * (1 + largest)
    assert (plain.nll - shifted.nll).abs().max() <= 2.0**-40
    assert torch.equal(plain.agrees, shifted.agrees)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30))
def test_kl_is_not_negative(seed: int, scale: float) -> None:
    p, q = logits_pair(5, 64, scale=scale, seed=seed)
    reach, largest = spans(p, q)
    kl = token_metrics(p, q, labels_of(5, 64)).kl
    assert kl.min() >= -2 * U * (reach + 4) * (1 + largest)


def test_kl_weighs_by_the_reference() -> None:
    p = torch.tensor([[0.0, 0.0]])
    q = torch.log(torch.tensor([[0.9, 0.1]]))
    forward = token_metrics(p, q, torch.tensor([0])).kl
    backward = token_metrics(q, p, torch.tensor([0])).kl
    assert float(forward) == pytest.approx(0.5108256, abs=1e-6)
    assert float(backward) == pytest.approx(0.3680642, abs=1e-6)


def test_masked_vocabulary_adds_nothing() -> None:
    p, q = logits_pair(6, 40, scale=2.0, seed=3)
    labels = labels_of(6, 40)
    padding = torch.full((6, 8), float("-inf"))
    plain = token_metrics(p, q, labels)
    padded = token_metrics(torch.cat([p, padding], 1), torch.cat([q, padding], 1), labels)
    # Adding zeros may only change the order of an f64 sum.
    assert (plain.kl - padded.kl).abs().max() <= 2.0**-45
    assert (plain.nll - padded.nll).abs().max() <= 2.0**-45


def test_nan_is_passed_on() -> None:
    p, q = logits_pair(4, 30, scale=1.0, seed=4)
    q[2, 7] = float("nan")
    metrics = token_metrics(p, q, labels_of(4, 30))
    assert metrics.kl.isnan().tolist() == [False, False, True, False]
    assert metrics.nll.isnan().tolist() == [False, False, True, False]


def test_shapes_are_checked() -> None:
    p, q = logits_pair(4, 30, scale=1.0, seed=4)
    with pytest.raises(ValueError, match=r"\[T, V\]"):
        token_metrics(p, q, labels_of(3, 30))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest floating tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        # A view holds no memory of its own.
        fresh = isinstance(result, Tensor) and not func.is_view
        if fresh and result.is_floating_point():
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize(("budget", "largest"), [(1000, 900), (100, 300), (10**9, 300 * 37)])
def test_temporaries_stay_within_the_budget(
    budget: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = (x.bfloat16() for x in logits_pair(37, 300, scale=3.0, seed=5))
    labels = labels_of(37, 300)
    whole = token_metrics(p, q, labels)
    monkeypatch.setattr(divergence, "CHUNK_ENTRIES", budget)
    with LargestTensor() as seen:
        chunked = token_metrics(p, q, labels)
    assert seen.entries == largest
    assert torch.equal(whole.kl, chunked.kl)
    assert torch.equal(whole.nll, chunked.nll)
    assert torch.equal(whole.agrees, chunked.agrees)
