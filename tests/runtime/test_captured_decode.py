"""Captured steps against eager ones: a CUDA graph that is played by ``recorded_graph`` on a CPU.

Replay and eager steps do the same operations, so that they agree bit by bit. Where hundreds of
steps are taken attention is the reference, which reads the same tensors as the kernels do; to the
recorder it is a launch like theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvq_formats import pages
from kvq_formats.errors import CacheFullError, KVQError, UnsupportedModelError
from kvq_formats.sidecar import Sidecar
from kvq_kernels import attention, decode, decode_reference
from kvq_runtime.attach import attach
from kvq_runtime.cache import PackedCache
from kvq_runtime.captured_decode import CapturedDecode
from kvq_runtime.cuda_graph import CaptureError
from kvq_runtime.layer_kernels import LayerKernels
from kvq_runtime.layer_step import addresses
from kvq_runtime.rotary_layout import learn_rotary
from kvq_runtime.row_pages import PooledPages
from no_waiting import nothing_waits
from opaque_launches import opaque
from recorded_graph import record
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar

DEVICE = torch.device(os.environ.get("KVQ_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
CAPTURE: Any = None if ON_GPU else record
RECENT = 5
WINDOW = RECENT + 256
PADDING = 7

IDS = torch.randint(3, 300, (2, 700), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_tiny_llama().to(DEVICE)


@pytest.fixture(scope="module")
def sidecar(model: LlamaForCausalLM) -> Sidecar:
    return make_sidecar(3, model=model, recent_tokens=RECENT)


@pytest.fixture
def plain_kernels(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and packing by the references, over what kernels get, at a thousandth the time."""
    if ON_GPU:
        return
    with torch.no_grad():
        rotary = learn_rotary(model)[0]

    def attend(query: Tensor, rows: Any, tables: Any, phases: Any, **how: Any) -> Tensor:
        del how["workspace"]
        return decode_reference.decode(query, rows, tables, rotary.angles(), **how)

    def encode(kernels: LayerKernels, keys: Tensor, values: Tensor) -> Any:
        parameters, config = kernels.tables.parameters, kernels.tables.config
        return (
            pages.encode_keys(keys.float(), parameters.key, config),
            pages.encode_values(values.float(), parameters.value, config),
        )

    def prefill(
        kernels: Any, query: Tensor, layer: Any, place: int, angles: Any, **seen: Any
    ) -> Any:
        read = PooledPages(layer.pool, layer.rows[place], angles)
        return attention.attend(query, pages=read, **seen)

    monkeypatch.setattr(decode, "decode", opaque(attend))
    monkeypatch.setattr(LayerKernels, "prefill", prefill)
    monkeypatch.setattr(LayerKernels, "encode", opaque(encode))


class Fed:
    """A padded batch on a packed cache of its own, with what a forward is told of it."""

    def __init__(
        self, model: Any, sidecar: Sidecar, prompt: int, *, capacity: int = 700, jump: int = 0
    ) -> None:
        """``jump``: positions that the second row leaves out in the middle of its prompt."""
        self.model = model
        self.cache = PackedCache(model, sidecar, capacity=capacity, batch_size=2)
        self.mask = torch.ones(2, prompt, dtype=torch.int64, device=DEVICE)
        self.mask[0, :PADDING] = 0
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.positions[1, prompt // 2 :] += jump
        with torch.no_grad(), attach(model, sidecar, impl="reference"):
            self._forward(IDS[:, :prompt])
        self.positions = self.positions[:, -1:]

    @property
    def slots(self) -> int:
        return self.cache.get_seq_length()

    def eager(self, tokens: int = 1) -> Tensor:
        """The next tokens of each row by a forward: logits ``[B, V]``."""
        ids = IDS[:, self.slots : self.slots + tokens]
        self._go_on(tokens)
        return self._forward(ids)

    def step(self, captured: CapturedDecode) -> Tensor:
        """The next token of each row by a captured step."""
        ids = IDS[:, self.slots]
        self._go_on(1)
        return captured.step(ids).clone()

    def crop(self, tokens: int) -> None:
        """Take back the last tokens of each row."""
        self.cache.crop(-tokens)
        self.mask = self.mask[:, :-tokens]
        self.positions = self.positions[:, -1:] - tokens

    def _go_on(self, tokens: int) -> None:
        self.positions = self.positions[:, -1:] + torch.arange(1, tokens + 1, device=DEVICE)
        self.mask = torch.nn.functional.pad(self.mask, (0, tokens), value=1)

    def _forward(self, ids: Tensor) -> Tensor:
        out = self.model(
            ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].clone()
        return logits

    @property
    def rows(self) -> list[Any]:
        return [layer.rows for layer in self.cache.layers]

    @property
    def addresses(self) -> list[tuple[int, ...]]:
        return [addresses(layer) for layer in self.cache.layers]


@contextmanager
def attached(model: Any, sidecar: Sidecar, **options: Any) -> Iterator[None]:
    with torch.no_grad(), attach(model, sidecar, impl="triton", **options):
        yield


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(("sinks", "layer_bits"), [(0, None), (3, {0: (2, 4), 1: (4, 3)})])
def test_replays_are_eager_steps(
    model: LlamaForCausalLM, sinks: int, layer_bits: dict[int, tuple[int, int]] | None
) -> None:
    """Over a window and more: every row packs a page, each at another step."""
    sidecar = make_sidecar(
        3, model=model, recent_tokens=RECENT, sink_tokens=sinks, layer_bits=layer_bits
    )
    prompt, steps = WINDOW + sinks + 9, WINDOW + 4
    eager, replayed = (Fed(model, sidecar, prompt) for _ in range(2))
    with attached(model, sidecar):
        captured = CapturedDecode(model, replayed.cache, capture=CAPTURE)
        before = replayed.addresses
        packed = []
        for _ in range(steps):
            assert torch.equal(replayed.step(captured), eager.eager())
            packed.append([len(row.pages) for row in replayed.rows[0]])
    assert replayed.rows == eager.rows
    assert (packed[0], packed[-1]) == ([1, 1], [2, 2])
    assert [1, 2] in packed
    assert replayed.addresses == before
    assert (captured.captures, captured.replays) == (1, steps)


@pytest.mark.parametrize("bits", [3] if not ON_GPU else [2, 3, 4])
def test_replays_of_kernels_are_eager_steps(bits: int) -> None:
    """With the kernels themselves, to the other side of a flush."""
    model = make_tiny_llama(num_hidden_layers=2 if ON_GPU else 1).to(DEVICE)
    # On a GPU the layers differ, so that all but the widest use a part of what they share.
    layer_bits = {0: (bits, 2), 1: (4, bits)} if ON_GPU else None
    sidecar = make_sidecar(bits, model=model, layer_bits=layer_bits)
    # The second row's tail holds one token less than a window.
    eager, replayed = (Fed(model, sidecar, 256) for _ in range(2))
    with attached(model, sidecar):
        captured = CapturedDecode(model, replayed.cache, capture=CAPTURE)
        for _ in range(300 if ON_GPU else 3):
            assert torch.equal(replayed.step(captured), eager.eager())
    assert [len(row.pages) for row in replayed.rows[0]][1] > 0
    if not ON_GPU:
        recorded: Any = captured._recorded
        assert recorded.launches > 2


@contextmanager
def device_left_alone() -> Iterator[None]:
    """The device is never waited for: torch refuses to on a GPU, and the test on a CPU."""
    if not ON_GPU:
        with nothing_waits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("plain_kernels")
def test_nothing_waits_for_the_device(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """Neither a step nor the flush of a page; ``record`` is stricter still with what it records."""
    fed = Fed(model, sidecar, WINDOW - 3)
    with attached(model, sidecar):
        captured = CapturedDecode(model, fed.cache, capture=CAPTURE)
        # Kernels are compiled and tables made once.
        fed.step(captured)
        with device_left_alone():
            for _ in range(15):
                fed.step(captured)
    assert [len(row.pages) for row in fed.rows[0]] == [1, 1]
    assert captured.captures == 1


@pytest.mark.usefixtures("plain_kernels")
def test_other_forwards_come_between(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """Chunks, single tokens, tokens taken back, beams and a reset: the device follows the host."""
    eager, mixed = (Fed(model, sidecar, 250) for _ in range(2))
    beams = torch.tensor([1, 1], device=DEVICE)
    with attached(model, sidecar):
        captured = CapturedDecode(model, mixed.cache, capture=CAPTURE)

        def both(steps: int) -> None:
            for _ in range(steps):
                assert torch.equal(mixed.step(captured), eager.eager())

        both(3)
        for fed in (eager, mixed):
            fed.eager(20)
            fed.eager()
        both(3)
        for fed in (eager, mixed):
            fed.crop(25)
        both(2)
        assert captured.captures == 1
        for fed in (eager, mixed):
            fed.cache.reorder_cache(beams)
            fed.mask, fed.positions = fed.mask[beams], fed.positions[beams]
        both(2)
        # As many rows stay where they lie.
        assert captured.captures == 1
        for fed in (eager, mixed):
            fed.cache.reset()
            fed.mask = fed.mask[:, :0]
            fed.positions = torch.full_like(fed.positions, -1)
        # From nothing, sinks first.
        both(3)
    assert captured.captures == 1


@pytest.mark.usefixtures("plain_kernels")
def test_what_moves_is_captured_anew(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """Cut pages take more than the pages of the capacity; a page of jumping positions is new."""
    # The second row jumps in the middle of what becomes its next page.
    eager, replayed = (Fed(model, sidecar, WINDOW - 1, jump=9) for _ in range(2))
    with attached(model, sidecar):
        captured = CapturedDecode(model, replayed.cache, capture=CAPTURE)
        for _ in range(5):
            assert torch.equal(replayed.step(captured), eager.eager())
        assert captured.captures == 2
        assert replayed.cache.layers[0].pool.irregular
    small, cut = (Fed(model, sidecar, 530, capacity=WINDOW + 300) for _ in range(2))
    with attached(model, sidecar):
        captured = CapturedDecode(model, cut.cache, capture=CAPTURE)
        assert torch.equal(cut.step(captured), small.eager())
        before = cut.addresses
        for fed in (small, cut):
            # Into the page, and full again behind it.
            fed.crop(fed.slots - 40)
            fed.eager(519)
        assert torch.equal(cut.step(captured), small.eager())
    assert cut.addresses != before
    assert captured.captures == 2


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("padded", [False, True])
def test_generate_replays(model: LlamaForCausalLM, sidecar: Sidecar, padded: bool) -> None:
    """Each token after the first; the prompt and its second turn run as they would without."""
    mask = torch.ones(2, 250, dtype=torch.int64, device=DEVICE)
    mask[0, :PADDING] = int(not padded)
    new = 14

    def turns(captured: CapturedDecode | None, cache: PackedCache) -> list[Any]:
        how = {"past_key_values": cache, "max_new_tokens": new, "do_sample": False}
        how |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
        first = model.generate(IDS[:, :250], attention_mask=mask, **how)
        text = torch.cat([first.sequences, IDS[:, 300:305]], dim=1)
        longer = torch.nn.functional.pad(mask, (0, text.shape[1] - 250), value=1)
        second = model.generate(text, attention_mask=longer, **how)
        return [first.sequences, second.sequences, *first.logits, *second.logits]

    caches = [PackedCache(model, sidecar, capacity=400, batch_size=2) for _ in range(2)]
    stock = model.forward
    with attached(model, sidecar):
        expected = turns(None, caches[0])
        with CapturedDecode(model, caches[1], capture=CAPTURE) as captured:
            found = turns(captured, caches[1])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert (captured.captures, captured.replays) == (1, 2 * (new - 1))
    assert model.forward == stock


@pytest.mark.usefixtures("plain_kernels")
def test_forwards_that_a_step_does_not_stand_for(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """They run as ever, with their results and their errors."""
    fed, other = Fed(model, sidecar, 30), Fed(model, sidecar, 30)
    with attached(model, sidecar), CapturedDecode(model, fed.cache, capture=CAPTURE) as captured:
        fed.eager()
        assert captured.replays == 1
        plain = model(IDS[:, 31:32], past_key_values=other.cache, position_ids=fed.positions)
        assert plain.past_key_values is other.cache
        fed.eager(2)
        asked = {"past_key_values": fed.cache, "attention_mask": fed.mask}
        hidden = torch.nn.functional.pad(fed.mask, (0, 1), value=1)
        ids = IDS[:, fed.slots : fed.slots + 1]
        goes_on = {"position_ids": fed.positions[:, -1:] + 1}
        changed = hidden.clone()
        changed[1, 3] = 0
        with pytest.raises(KVQError, match="differs from the one"):
            model(ids, **asked | goes_on | {"attention_mask": changed})
        with pytest.raises(KVQError, match="attention_mask is"):
            model(ids, **asked | goes_on)
        asked["attention_mask"] = hidden
        # A new token is hidden, positions jump, positions are those of slots, more is asked for.
        padding = hidden.clone()
        padding[1, -1] = 0
        for options in (
            {"attention_mask": padding},
            {"position_ids": fed.positions[:, -1:] + 5},
            {"position_ids": None},
            {"output_hidden_states": True},
            {"return_dict": False},
        ):
            out = model(ids, **asked | goes_on | options)
            fed.cache.crop(-1)
        assert isinstance(out, tuple)
        assert captured.replays == 1
        # What goes on where the cache stands is a step again, and what it returns stays.
        first = model(ids, **asked | goes_on)
        kept = first.logits.clone()
        fed.cache.crop(-1)
        model(ids + 1, **asked | goes_on)
        assert captured.replays == 3
        assert torch.equal(first.logits, kept)
        assert first.past_key_values is fed.cache


@pytest.mark.usefixtures("plain_kernels")
def test_a_mask_that_pads_on_the_right(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """Slots that are not attended may lie anywhere before the step."""
    eager, replayed = Fed(model, sidecar, 30), Fed(model, sidecar, 30)
    with attached(model, sidecar):
        for fed in (eager, replayed):
            fed.mask = torch.nn.functional.pad(fed.mask, (0, 2))
            fed.positions = fed.positions.expand(2, 2)
            fed._forward(IDS[:, 30:32])
        with CapturedDecode(model, replayed.cache, capture=CAPTURE) as captured:
            found = [replayed.eager() for _ in range(3)]
        assert captured.replays == 3
        for one in found:
            assert torch.equal(one, eager.eager())


def test_steps_that_are_refused(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    fed = Fed(model, sidecar, 30, capacity=31)
    with pytest.raises(KVQError, match="this one is not"):
        CapturedDecode(model, fed.cache, capture=record)
    with attached(model, sidecar):
        captured = CapturedDecode(model, fed.cache, capture=record)
        with pytest.raises(KVQError, match=r"token_ids is \[3\]; the cache holds 2 rows"):
            captured.step(IDS[0, :3])
        for no_ids in (IDS[:, 0].float(), IDS[:, 0].tolist(), IDS[:, 0].cpu().numpy()):
            with pytest.raises(KVQError, match=r"token_ids is .* expected"):
                captured.step(no_ids)
        fed.cache.layers[0].torn = True
        with pytest.raises(KVQError, match="is not whole"):
            captured.step(IDS[:, 0])
        fed.cache.layers[0].torn = False
        fed.cache.layers[0].slots = 31
        with pytest.raises(KVQError, match="failed between the layers"):
            captured.step(IDS[:, 0])
        for layer in fed.cache.layers:
            layer.slots = 31
        with pytest.raises(CacheFullError, match="has room for 31 tokens"):
            captured.step(IDS[:, 0])
    with attached(model, sidecar), pytest.raises(KVQError, match="captured in is closed"):
        captured.step(IDS[:, 0])


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    fed = Fed(model, sidecar, 3)
    with attached(model, sidecar), pytest.raises(KVQError, match="need a CUDA or ROCm GPU"):
        CapturedDecode(model, fed.cache)
    # Where it is the reason, too, why attention runs on the reference.
    with attach(model, sidecar), pytest.raises(KVQError, match="need a CUDA or ROCm GPU"):
        CapturedDecode(model, fed.cache)


@pytest.mark.usefixtures("plain_kernels")
def test_a_capture_that_fails(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """It is an error; or, where that was allowed, a note and eager steps."""

    def fails(function: Any, prepare: Any, device: torch.device) -> Any:
        prepare()
        function()
        raise CaptureError("operation not permitted")

    eager, fed = Fed(model, sidecar, 30), Fed(model, sidecar, 30)
    with attached(model, sidecar):
        with CapturedDecode(model, fed.cache, capture=fails), pytest.raises(CaptureError):
            fed.eager()
        fed.mask, fed.positions = fed.mask[:, :-1], fed.positions - 1
        captured = CapturedDecode(model, fed.cache, capture=fails, eager_if_refused=True)
        with captured:
            for _ in range(3):
                assert torch.equal(fed.eager(), eager.eager())
    assert captured.refused is not None
    assert captured.replays == 0


@pytest.mark.usefixtures("plain_kernels")
def test_a_window_that_a_step_could_outgrow(sidecar: Sidecar) -> None:
    """Eager forwards say so when it is full; a captured one could not."""
    model: Any = make_tiny_llama().to(DEVICE)
    model.forward = functools.partial(model.forward, sliding_window=40)
    fed = Fed(model, sidecar, 30)
    with attached(model, sidecar):
        captured = CapturedDecode(model, fed.cache, capture=CAPTURE, eager_if_refused=True)
        with pytest.raises(CaptureError, match="40 tokens and the cache has room for 700"):
            captured.step(IDS[:, 30])
        with captured:
            for _ in range(10):
                fed.eager()
            with pytest.raises(UnsupportedModelError, match="the cache holds 41"):
                fed.eager()
    assert captured.refused is not None


@pytest.mark.usefixtures("plain_kernels")
def test_fewer_rows(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    eager, replayed = Fed(model, sidecar, 30), Fed(model, sidecar, 30)
    with (
        attached(model, sidecar),
        CapturedDecode(model, replayed.cache, capture=CAPTURE) as captured,
    ):
        assert torch.equal(captured.step(IDS[:, 30]), eager.eager())
        eager.cache.batch_select_indices(torch.tensor([1]))
        replayed.cache.batch_select_indices(torch.tensor([1]))
        for place in range(31, 34):
            asked = {"position_ids": torch.full((1, 1), place, device=DEVICE)}
            ids = IDS[1:, place : place + 1]
            found = model(ids, past_key_values=replayed.cache, **asked)
            expected = model(ids, past_key_values=eager.cache, **asked)
            assert torch.equal(found.logits, expected.logits)
    assert (captured.captures, captured.replays) == (2, 4)


def test_an_open_one_is_not_opened_again(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    fed = Fed(model, sidecar, 3)
    with attached(model, sidecar):
        captured = CapturedDecode(model, fed.cache, capture=record)
        with captured:
            ours = model.forward
            with pytest.raises(KVQError, match="open already") as found, captured:
                pass
            assert found.value.hint
            assert model.forward is ours
        assert "forward" not in vars(model)
        with captured:
            assert "forward" in vars(model)
        captured.__exit__(None, None, None)
    assert "forward" not in vars(model)


def test_the_forward_that_was_there_before(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """It is back afterwards, and one that was put on top stays, in whatever order they leave."""
    fed, other = Fed(model, sidecar, 3), Fed(model, sidecar, 3)
    theirs: Any = functools.partial(model.forward)
    free: Any = model
    with attached(model, sidecar):
        one, two = (CapturedDecode(model, each.cache, capture=record) for each in (fed, other))
        free.forward = theirs
        with one:
            assert model.forward is not theirs
        assert model.forward is theirs
        del free.forward
        with one:
            ours = model.forward
            with two:
                assert model.forward is not ours
            assert model.forward is ours
        one.__enter__()
        two.__enter__()
        ours = model.forward
        one.__exit__(None, None, None)
        assert model.forward is ours
        # Opened again it lies above the other, and below it, closed.
        one.__enter__()
        model(IDS[:, :2])
        two.__exit__(None, None, None)
        one.__exit__(None, None, None)
        assert "forward" not in vars(model)
        one.__enter__()
        free.forward = theirs
        one.__exit__(None, None, None)
        assert model.forward is theirs
        del free.forward


@pytest.mark.usefixtures("plain_kernels")
def test_two_of_one_cache(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """The outer one captures the model's own step, not a step of the inner one."""
    eager, fed = Fed(model, sidecar, 30), Fed(model, sidecar, 30)
    with attached(model, sidecar):
        first, second = (CapturedDecode(model, fed.cache, capture=CAPTURE) for _ in range(2))
        expected = [eager.eager() for _ in range(3)]
        with first, second:
            for one in expected:
                assert torch.equal(fed.eager(), one)
    assert (first.replays, second.replays) == (0, 3)


@pytest.mark.usefixtures("plain_kernels")
def test_forwards_that_all_pass_are_told_of(
    model: LlamaForCausalLM, sidecar: Sidecar, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kvq_runtime.captured_decode")
    fed, other = Fed(model, sidecar, 30), Fed(model, sidecar, 30)
    with attached(model, sidecar):
        captured = CapturedDecode(model, fed.cache, capture=CAPTURE)
        with captured:
            fed.eager(3)
        with captured:
            other.eager()
            fed.eager()
        wrong = {"attention_mask": other.mask[:, :2], "past_key_values": other.cache}
        with pytest.raises(KVQError, match="attention_mask is"), captured:
            model(IDS[:, :1], **wrong)
        assert not caplog.messages
        with captured:
            other.eager(5)
            other.eager()
            other.eager()
        (message,) = caplog.messages
        assert message.startswith("none of 2 forwards of one token was replayed")
        # Closed, it steps on.
        before = captured.captures
        fed.step(captured)
        assert captured.captures == before + 1


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_replay_that_fails(
    model: LlamaForCausalLM, sidecar: Sidecar, error: type[BaseException]
) -> None:
    """Nobody knows what it wrote: the cache refuses to go on until it is reset."""

    class Fails:
        result = None

        def replay(self) -> None:
            raise error

    fed = Fed(model, sidecar, 30)
    with attached(model, sidecar):
        captured = CapturedDecode(model, fed.cache, capture=lambda *_: Fails())
        with pytest.raises(error):
            captured.step(IDS[:, 30])
        with pytest.raises(KVQError, match="is not whole"):
            captured.step(IDS[:, 30])
        with pytest.raises(KVQError, match="is not whole"):
            fed.eager()
        fed.cache.reset()
        model(IDS[:, :1], past_key_values=fed.cache)
    assert captured.replays == 0


@pytest.mark.usefixtures("plain_kernels")
def test_pages_that_moved_are_captured_anew(model: LlamaForCausalLM, sidecar: Sidecar) -> None:
    """Any one tensor of them, whatever else stays."""
    eager, replayed = (Fed(model, sidecar, WINDOW + 20) for _ in range(2))
    pool = replayed.cache.layers[-1].pool
    with attached(model, sidecar):
        captured = CapturedDecode(model, replayed.cache, capture=CAPTURE)
        assert torch.equal(replayed.step(captured), eager.eager())
        captures = 1
        for part in ("key", "value"):
            for field in dataclasses.fields(getattr(pool.slabs[0], part)):
                (slab,) = pool.slabs
                pages = getattr(slab, part)
                moved = {field.name: getattr(pages, field.name).clone()}
                moved = {part: dataclasses.replace(pages, **moved)}
                pool.slabs = [dataclasses.replace(slab, **moved)]
                captured.step(IDS[:, 0])
                captures += 1
                assert captured.captures == captures
        replayed.cache.crop(-(captures - 1))
        assert torch.equal(replayed.step(captured), eager.eager())
    assert captured.captures == captures
