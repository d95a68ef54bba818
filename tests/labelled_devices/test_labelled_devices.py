"""Pretended devices: the numbers of the CPU, the discipline of CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from labelled_devices import LabelledTensor, labelled_devices

ONE = torch.device("cuda:1")


def numbers(*shape: int, device: str = "cuda:1") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, 3, device="cuda:1"),
        lambda: torch.empty(2, device=ONE),
        lambda: torch.arange(5, device=ONE),
        lambda: torch.full((2,), 3.0, device=ONE),
        lambda: torch.tensor([1, 2], device=ONE),
        lambda: torch.eye(3, device=ONE),
        lambda: numbers(3).new_zeros(2),
        lambda: torch.ones_like(numbers(3)),
        lambda: numbers(3, device="cpu").to(ONE),
        lambda: numbers(3, device="cuda:0").to(numbers(3)),
        lambda: numbers(3, device="cpu").to(torch.float64).cuda(1),
        lambda: nn.Linear(3, 2).to(ONE).weight,
    ],
)
@labelled_devices()
def test_whatever_makes_a_tensor_there(make: Callable[[], Tensor]) -> None:
    made = make()
    assert isinstance(made, LabelledTensor)
    assert made.device == ONE
    assert made.is_cuda
    assert not made.is_meta


@labelled_devices()
def test_a_device_without_a_number_is_the_first() -> None:
    assert torch.zeros(1, device="cuda").device == torch.device("cuda:0")
    with torch.device("cuda:2"):
        assert torch.zeros(1).device == torch.device("cuda:2")


@labelled_devices()
def test_numbers_are_read_on_the_host() -> None:
    x = torch.arange(4.0, device=ONE)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert x.sum().item() == float(x.sum()) == 6.0
    assert bool(x.sum() > 5)
    assert [int(part) for part in x] == [0, 1, 2, 3]
    assert type(x.cpu()) is type(x.to("cpu")) is Tensor
    assert torch.equal(x.cpu(), torch.arange(4.0))
    assert (x.nbytes, x.untyped_storage().nbytes()) == (16, 16)
    assert "cuda:1" in repr(x)
    with pytest.raises(TypeError, match="cuda:1"):
        x.numpy()


@labelled_devices()
def test_views_share_their_numbers() -> None:
    x = torch.zeros(4, 4, device=ONE)
    x[1:3].copy_(torch.ones(2, 4))
    x[:, 0].fill_(5.0)
    x[torch.tensor([3], device=ONE)] = 7.0
    x[0, 1:] += 2
    assert x.tolist() == [[5, 2, 2, 2], [5, 1, 1, 1], [5, 1, 1, 1], [7, 7, 7, 7]]
    bits = x.view(torch.int32)
    bits.zero_()
    assert not x.any()
    assert bits.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    version = x._version
    x[0].add_(1)
    assert x._version > version


@labelled_devices()
def test_what_is_written_to_comes_back() -> None:
    x, out = numbers(3), torch.empty(3, device=ONE)
    assert torch.mul(x, 2, out=out) is out
    assert torch.equal(out, x + x)
    assert x.add_(1) is x


@pytest.mark.parametrize("there", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x @ y.mT,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        torch.equal,
        lambda x, y: x.mul_(y),
        lambda x, y: torch.mul(x, x, out=y),
        lambda x, y: torch.mul(y, y, out=x),
        lambda x, y: x.index_select(0, y[0].long()),
        lambda x, y: x.gather(0, y.long().abs()),
        lambda x, y: x.scatter_(0, y.long().abs(), x + 1),
        lambda x, y: y[x[0].long()],
        lambda x, y: torch.addcmul(x, x, y),
        lambda x, y: nn.functional.embedding(y.long().abs(), x),
        # A single number is no exception where it is written to, looked for, or elsewhere.
        lambda x, y: y.sum().add_(x.sum()),
        lambda x, y: torch.searchsorted(x[0].contiguous(), y[0, 0]),
        lambda x, y: torch.equal(x[0, 0], y[0, 0]),
        lambda x, y: x[0, 0] * y,
    ],
)
@labelled_devices()
def test_mixing_raises(mix: Callable[[Tensor, Tensor], Any], there: str) -> None:
    x, y = (numbers(2, 2, device=device).clamp(-1, 1) for device in ("cuda:1", there))
    with pytest.raises(RuntimeError, match=f"two devices, .*{there}"):
        mix(x, y)
    # The operation itself is one that runs.
    mix(x, y.to(ONE).clone())


@labelled_devices()
def test_numbers_and_brackets_on_the_cpu_go_with_any_device() -> None:
    x, one = numbers(2, 3), torch.tensor(1.0)
    for found in (x + one, one - x, torch.where(x > 0, x, one), x.masked_fill(x > 0, one)):
        assert found.device == ONE
    assert torch.equal(x[torch.tensor([1, 0])], x.flip(0))
    assert torch.equal(x[[1, 0]], x.flip(0))
    x[torch.tensor([True, False])] = one
    assert x[0].tolist() == [1, 1, 1]
    # Numbers elsewhere do not.
    with pytest.raises(RuntimeError, match="two devices"):
        x + one.to("cuda:0")
    with pytest.raises(RuntimeError, match="two devices"):
        x[torch.tensor([0], device="cuda:0")]


@labelled_devices()
def test_copies_go_from_any_device_to_any_other() -> None:
    x = numbers(3)
    y = torch.empty(3, device="cuda:0").copy_(x)
    z = torch.empty(3).copy_(y, non_blocking=True)
    assert (y.device.index, type(z)) == (0, Tensor)
    assert torch.equal(z, x.cpu())
    assert x.to(ONE) is x
    assert x.to(ONE, copy=True) is not x


def network(x: Tensor, weight: Tensor) -> Tensor:
    hidden = silu(x @ weight) * torch.rsqrt(x.square().mean() + 1)
    return (hidden @ weight.mT).softmax(-1)


@labelled_devices()
def test_gradients_flow_between_devices_and_are_those_of_the_cpu() -> None:
    """Also through a part that is computed once more: what it does there is seen, too."""
    found = []
    for first, second in (("cpu", "cpu"), ("cuda:0", "cuda:1")):
        x = numbers(5, 8, device=first).requires_grad_(True)
        weight = numbers(8, 8, device=second).requires_grad_(True)

        def moved(x: Tensor, w: Tensor = weight) -> Tensor:
            return network(x.to(w.device), w)

        logits = checkpoint(moved, x, use_reentrant=False)
        cross_entropy(logits, torch.arange(5, device=second)).backward()
        assert (str(x.grad.device), str(weight.grad.device)) == (first, second)
        found.append([part.cpu() for part in (logits.detach(), x.grad, weight.grad)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert found[0][2].abs().max() > 0


@labelled_devices()
def test_inference_mode_marks_what_is_made_in_it() -> None:
    x = numbers(3)
    with torch.inference_mode():
        y = x + 1
    assert y.is_inference()
    with pytest.raises(RuntimeError, match="inference tensor"):
        y.add_(1)


@labelled_devices()
def test_what_is_not_pretended_is_refused() -> None:
    x = numbers(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="fused attention"):
        scaled_dot_product_attention(x, x, x)
    with pytest.raises(NotImplementedError, match="in place"):
        x.squeeze_(0)


def test_outside_all_is_as_it_was() -> None:
    def state() -> tuple[bool, bool, tuple[int, int]]:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "Lazy")
        modes = torch._C._len_torch_function_stack(), len(_get_current_dispatch_mode_stack())
        return torch._C._only_lift_cpu_tensors(), has_kernel, modes

    before = state()
    with labelled_devices():
        assert state() == (True, True, (1, 1))
    assert state() == before
    with pytest.raises(RuntimeError, match="two devices"), labelled_devices():
        numbers(2) + numbers(2, device="cuda:0")
    assert state() == before == (False, False, (0, 0))
