"""The seam sees what it claims to see, and leaves no trace."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_runtime import rope
from kvq_runtime.rope import AttentionCall, AttentionTap, RotaryCall, tap_attention
from tiny_models import make_tiny_family, make_tiny_llama

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite"]


class Recorder(AttentionTap):
    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.forwards = 0

    def on_forward(self, arguments: Any) -> None:
        self.forwards += 1

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        self.keys[call.layer_idx] = call.key
        return super().on_rotary(call)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.values[call.layer_idx] = call.value
        return super().on_attention(call)


def projected(attention: torch.nn.Module, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, T, D]`` from the outputs of the module's own submodules."""
    D = attention.head_dim
    if "qkv_proj" in outputs:
        fused = outputs["qkv_proj"].unflatten(-1, (-1, D))
        key, value = fused[..., 4:6, :], fused[..., 6:8, :]
    else:
        key = outputs.get("k_norm", outputs["k_proj"])
        key = key.unflatten(-1, (-1, D)) if key.dim() == 3 else key
        value = outputs["v_proj"].unflatten(-1, (-1, D))
    if key.shape[1] != value.shape[1]:
        key = key.transpose(1, 2)
    return key.transpose(1, 2), value.transpose(1, 2)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_keys_are_taken_before_rope_and_after_k_norm(model_type: str) -> None:
    model = make_tiny_family(model_type)
    ids = torch.randint(3, 199, (2, 24))
    stock = model(ids).logits
    seen: dict[int, dict[str, Tensor]] = {}
    handles = []
    for index, module in rope.attention_modules(model).items():
        for name, child in module.named_children():
            store = seen.setdefault(index, {})
            handles.append(
                child.register_forward_hook(
                    lambda _m, _a, out, store=store, name=name: store.__setitem__(name, out)
                )
            )
    recorder = Recorder()
    with tap_attention(model, recorder):
        tapped = model(ids).logits
    assert torch.equal(tapped, stock)
    assert sorted(recorder.keys) == sorted(recorder.values) == [0, 1]
    assert recorder.forwards == 1
    for index, module in rope.attention_modules(model).items():
        key, value = projected(module, seen[index])
        assert torch.equal(recorder.keys[index], key)
        assert torch.equal(recorder.values[index], value)


@torch.no_grad()
def test_the_model_is_the_stock_model_again() -> None:
    model = make_tiny_llama()
    ids = torch.randint(3, 300, (1, 20))
    stock = model(ids).logits
    file = __import__(type(model).__module__, fromlist=["x"])
    before = (file.apply_rotary_pos_emb, model.config._attn_implementation)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    class Failing(AttentionTap):
        def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            raise RuntimeError("in the middle of a layer")

    with pytest.raises(RuntimeError, match="middle"), tap_attention(model, Failing()):
        model(ids)
    assert (file.apply_rotary_pos_emb, model.config._attn_implementation) == before
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert left == hooks
    assert torch.equal(model(ids).logits, stock)
    assert not [n for n in rope.AttentionInterface._global_mapping if n.startswith(rope.PREFIX)]


@torch.no_grad()
def test_another_model_of_the_same_file_is_not_tapped() -> None:
    tapped, bystander = make_tiny_llama(), make_tiny_llama(seed=1)
    ids = torch.randint(3, 300, (1, 20))
    stock = bystander(ids).logits
    recorder = Recorder()
    with tap_attention(tapped, recorder):
        assert torch.equal(bystander(ids).logits, stock)
    assert recorder.keys == {}
    assert recorder.values == {}


@torch.no_grad()
def test_two_models_of_one_file_are_tapped_apart() -> None:
    models = make_tiny_llama(), make_tiny_llama(seed=1)
    ids = torch.randint(3, 300, (1, 20))
    stock = [model(ids).logits for model in models]
    outer, inner = Recorder(), Recorder()
    with tap_attention(models[0], outer):
        with tap_attention(models[1], inner):
            assert torch.equal(models[0](ids).logits, stock[0])
            assert (sorted(outer.values), inner.values) == ([0, 1], {})
            assert torch.equal(models[1](ids).logits, stock[1])
        assert sorted(inner.values) == [0, 1]
        assert not torch.equal(inner.keys[0], outer.keys[0])
        assert torch.equal(models[0](ids).logits, stock[0])


LAYERS = [0, 1]
STOCK = modeling_llama.apply_rotary_pos_emb
DEADLINE = 60.0


@pytest.fixture
def left_as_it_was() -> Iterator[None]:
    """The rotary function is the very object that it was, and no model or tap is remembered."""
    names = sorted(rope.AttentionInterface._global_mapping)
    yield
    assert modeling_llama.apply_rotary_pos_emb is STOCK
    assert rope._patches == {}
    assert sorted(rope.AttentionInterface._global_mapping) == names


class Interrupting(Recorder):
    """Fails once, in the middle of a layer: before it rotates, or as it attends."""

    def __init__(self, error: BaseException, *, rotating: bool) -> None:
        super().__init__()
        self.error: BaseException | None = error
        self.rotating = rotating

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        self.fail(self.rotating)
        return super().on_rotary(call)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.fail(not self.rotating)
        return super().on_attention(call)

    def fail(self, here: bool) -> None:
        if here and (error := self.error) is not None:
            self.error = None
            raise error


def ids(tokens: int = 20) -> Tensor:
    return torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.usefixtures("left_as_it_was")
@torch.no_grad()
def test_models_of_one_file_are_left_in_any_order(order: tuple[int, ...]) -> None:
    models = [make_tiny_llama(seed=seed) for seed in range(3)]
    stock = [model(ids()).logits for model in models]
    recorders = [Recorder() for _ in models]
    entered = [ExitStack() for _ in models]
    for context, model, recorder in zip(entered, models, recorders, strict=True):
        context.enter_context(tap_attention(model, recorder))
    open_now = {0, 1, 2}
    for leaving in (*order, None):
        for index, model in enumerate(models):
            for recorder in recorders:
                recorder.keys.clear()
            assert torch.equal(model(ids()).logits, stock[index])
            seen = [sorted(recorder.keys) for recorder in recorders]
            assert seen == [LAYERS if index == n and n in open_now else [] for n in range(3)]
        if leaving is not None:
            entered[leaving].close()
            open_now.remove(leaving)
            assert (modeling_llama.apply_rotary_pos_emb is STOCK) == (not open_now)


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.usefixtures("left_as_it_was")
@torch.no_grad()
def test_nothing_keeps_a_model_that_was_left_alive(first_out: int) -> None:
    def attached(seed: int) -> tuple[ExitStack, PreTrainedModel, weakref.ref[Recorder]]:
        context, model, tap = ExitStack(), make_tiny_llama(seed=seed), Recorder()
        context.enter_context(tap_attention(model, tap))
        model(ids())
        return context, model, weakref.ref(tap)

    entered = [attached(0), attached(1)]
    for leaving in (first_out, 0):
        context, model, tap = entered.pop(leaving)
        remains = weakref.ref(model)
        context.close()
        del context, model
        gc.collect()
        assert (remains(), tap()) == (None, None)


@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.usefixtures("left_as_it_was")
@torch.no_grad()
def test_a_forward_that_fails_leaves_the_others_alone(
    error: type[BaseException], rotating: bool, first_out: int
) -> None:
    """torch runs no hooks after Ctrl-C: the layer that was interrupted never says that it ended."""
    models = [make_tiny_llama(), make_tiny_llama(seed=1)]
    stock = [model(ids()).logits for model in models]
    recorders = [Interrupting(error(), rotating=rotating), Recorder()]
    entered = [ExitStack() for _ in models]
    for context, model, recorder in zip(entered, models, recorders, strict=True):
        context.enter_context(tap_attention(model, recorder))
    with pytest.raises(error):
        models[0](ids())
    recorders[0].keys.clear()
    assert torch.equal(models[1](ids()).logits, stock[1])
    assert (sorted(recorders[0].keys), sorted(recorders[1].keys)) == ([], LAYERS)
    assert torch.equal(models[0](ids()).logits, stock[0])
    assert sorted(recorders[0].keys) == LAYERS
    entered[first_out].close()
    for model, logits in zip(models, stock, strict=True):
        assert torch.equal(model(ids()).logits, logits)
    entered[1 - first_out].close()
    for model, logits in zip(models, stock, strict=True):
        assert torch.equal(model(ids()).logits, logits)


@pytest.mark.usefixtures("left_as_it_was")
@torch.no_grad()
def test_what_was_interrupted_and_left_taps_no_one() -> None:
    """Left in the layer where Ctrl-C struck, and in another thread than it ran in."""
    model, bystander = make_tiny_llama(), make_tiny_llama(seed=1)
    stock = bystander(ids()).logits
    recorder, other = Interrupting(KeyboardInterrupt(), rotating=False), Recorder()
    first, second = ExitStack(), ExitStack()
    first.enter_context(tap_attention(model, recorder))
    second.enter_context(tap_attention(make_tiny_llama(seed=2), other))
    with pytest.raises(KeyboardInterrupt):
        model(ids())
    recorder.keys.clear()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first.close).result(DEADLINE)
    # The function is still replaced, for the second.
    assert torch.equal(bystander(ids()).logits, stock)
    assert (recorder.keys, other.keys) == ({}, {})
    second.close()


@pytest.mark.usefixtures("left_as_it_was")
@torch.no_grad()
def test_a_second_tap_is_refused_and_the_others_stay() -> None:
    models = make_tiny_llama(), make_tiny_llama(seed=1)
    recorders = Recorder(), Recorder()
    with tap_attention(models[0], recorders[0]), tap_attention(models[1], recorders[1]):
        for model in models:
            with (
                pytest.raises(KVQError, match="attached to this LlamaForCausalLM already"),
                tap_attention(model, AttentionTap()),
            ):
                pass
        for model, recorder in zip(models, recorders, strict=True):
            model(ids())
            assert sorted(recorder.values) == LAYERS


def test_a_function_that_was_put_on_top_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llama()
    stock = model(ids()).logits
    # So that monkeypatch restores the stock function, and not the tapped one.
    monkeypatch.setattr(modeling_llama, rope.ROTARY_FUNCTION, STOCK)
    with tap_attention(model, AttentionTap()):
        tapped = modeling_llama.apply_rotary_pos_emb

        def on_top(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return tapped(*args, **kwargs)  # type: ignore[no-any-return]

        modeling_llama.apply_rotary_pos_emb = on_top
    assert modeling_llama.apply_rotary_pos_emb is on_top
    assert torch.equal(model(ids()).logits, stock)


class Waiting(Recorder):
    """Each forward waits in its first layer until ``go`` says so."""

    def __init__(self, go: Callable[[], Any]) -> None:
        super().__init__()
        self.go = go
        self.inside = threading.Event()

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        if call.layer_idx == 0:
            self.inside.set()
            self.go()
        return super().on_rotary(call)


def logits(model: torch.nn.Module) -> Tensor:
    # Gradients are switched off for each thread apart.
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found


@pytest.mark.usefixtures("left_as_it_was")
def test_a_model_for_each_thread() -> None:
    """Both are inside their first layers at once, and each is asked for its own keys."""
    models = make_tiny_llama(), make_tiny_llama(seed=1)
    stock = [logits(model) for model in models]
    alone = [Recorder(), Recorder()]
    for model, recorder in zip(models, alone, strict=True):
        with tap_attention(model, recorder):
            logits(model)
    both = threading.Barrier(2, timeout=DEADLINE)

    def attached(index: int) -> Recorder:
        tap = Waiting(both.wait)
        with tap_attention(models[index], tap):
            assert torch.equal(logits(models[index]), stock[index])
        return tap

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(attached, index) for index in range(2)]
        recorders = [future.result(DEADLINE) for future in waiting]
    for recorder, expected in zip(recorders, alone, strict=True):
        assert sorted(recorder.keys) == LAYERS
        for index in LAYERS:
            assert torch.equal(recorder.keys[index], expected.keys[index])


@pytest.mark.usefixtures("left_as_it_was")
def test_a_second_thread_is_refused_while_a_forward_runs() -> None:
    model = make_tiny_llama()
    stock = logits(model)
    go = threading.Event()
    tap = Waiting(lambda: go.wait(DEADLINE))
    with tap_attention(model, tap), ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model)
        try:
            assert tap.inside.wait(DEADLINE)
            for _ in range(2):
                with pytest.raises(KVQError, match="one forward at a time") as caught:
                    logits(model)
                assert caught.value.hint == "a lock around the model, or a model for each thread"
            assert tap.forwards == 1
        finally:
            go.set()
        # The one that was running is undisturbed, and afterwards any thread may be next.
        assert torch.equal(running.result(DEADLINE), stock)
        assert torch.equal(logits(model), stock)
        assert torch.equal(pool.submit(logits, model).result(DEADLINE), stock)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.usefixtures("left_as_it_was")
def test_after_a_forward_that_failed_another_thread_may_run(error: type[BaseException]) -> None:
    model = make_tiny_llama()
    stock = logits(model)
    with tap_attention(model, Interrupting(error(), rotating=True)):
        with pytest.raises(error):
            logits(model)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(logits, model).result(DEADLINE), stock)


def test_a_rotary_function_of_one_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llama()
    file = sys.modules[type(model).__module__]
    monkeypatch.setattr(file, rope.ROTARY_FUNCTION, lambda x, cos, sin: x)
    with (
        pytest.raises(UnsupportedModelError, match="queries and keys together"),
        tap_attention(model, AttentionTap()),
    ):
        pass


def test_attention_that_is_not_understood_is_refused() -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32
    )
    model = AutoModelForCausalLM.from_config(config)
    with (
        pytest.raises(UnsupportedModelError, match="has no apply_rotary_pos_emb"),
        tap_attention(model, AttentionTap()),
    ):
        pass
