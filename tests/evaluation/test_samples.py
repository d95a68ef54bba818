"""Samples against plain hooks and autograd, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvq_evaluation.samples import LayerSamples, collect_samples
from kvq_formats.errors import CalibrationError, DataError
from projections import projected

SINKS = 3
T = 20


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 300, (2, T), generator=torch.Generator().manual_seed(8))


def after_sinks(x: Tensor) -> Tensor:
    """``[B, T, heads, D]`` -> ``[B * (T - SINKS), heads, D]``, window behind window."""
    return x[:, SINKS:].flatten(0, 1)


def rotated(model: LlamaForCausalLM, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both ``[B, T, heads, D]``, as transformers rotates them."""
    angles = model.model.rotary_emb(queries, torch.arange(queries.shape[1])[None])
    both = apply_rotary_pos_emb(queries.transpose(1, 2), keys.transpose(1, 2), *angles)
    q, k = (x.transpose(1, 2) for x in both)
    return q, k


def close(found: Tensor, expected: Tensor, *, relative: float = 1e-5) -> bool:
    """Within rounding of some hundred fp32 operations."""
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= relative * expected.abs().max())


def test_samples_are_what_layers_attend_over(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    found = collect_samples(tiny_llama, windows, sink_tokens=SINKS)
    assert list(found) == [0, 1]
    for layer, expected in projected(tiny_llama, windows).items():
        samples = found[layer]
        queries, keys = rotated(tiny_llama, expected.queries, expected.keys)
        tokens = 2 * (T - SINKS)
        assert samples.keys.shape == samples.values.shape == (tokens, 2, 16)
        assert samples.queries.shape == (tokens, 4, 16)
        assert close(samples.keys, after_sinks(expected.keys))
        assert close(samples.rotated_keys, after_sinks(keys))
        assert close(samples.values, after_sinks(expected.values))
        assert close(samples.queries, after_sinks(queries))
        # Those before and after RoPE differ, so that none of them is taken for the other.
        assert not close(samples.keys, samples.rotated_keys, relative=0.1)


def test_sensitivity_is_the_squared_gradient(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    found = collect_samples(tiny_llama, windows, sink_tokens=SINKS)
    for layer, expected in projected(tiny_llama, windows).items():
        key, value = found[layer].key_sensitivity, found[layer].value_sensitivity
        assert key is not None
        assert value is not None
        # Rounding of a few hundred operations, recomputed, squared.
        assert close(key, after_sinks(expected.key_gradient).square(), relative=1e-4)
        assert close(value, after_sinks(expected.value_gradient).square(), relative=1e-4)
        assert key.max() > 0
        assert value.max() > 0


def test_without_sensitivity_the_rest_is_the_same(
    tiny_llama: LlamaForCausalLM, windows: Tensor
) -> None:
    plain = collect_samples(tiny_llama, windows, sink_tokens=SINKS, sensitivity=False)
    weighed = collect_samples(tiny_llama, windows, sink_tokens=SINKS)
    for layer, samples in plain.items():
        assert samples.key_sensitivity is None
        assert samples.value_sensitivity is None
        for name in ("keys", "rotated_keys", "values", "queries"):
            assert torch.equal(getattr(samples, name), getattr(weighed[layer], name))


@pytest.mark.parametrize("sensitivity", [True, False])
@pytest.mark.parametrize(("max_tokens", "stride"), [(2 * T, 1), (2 * T - 1, 2), (T, 2), (9, 5)])
def test_long_text_is_thinned_out_window_by_window(
    tiny_llama: LlamaForCausalLM, windows: Tensor, max_tokens: int, stride: int, sensitivity: bool
) -> None:
    def collect(**options: int) -> LayerSamples:
        options["sink_tokens"] = SINKS
        return collect_samples(tiny_llama, windows, sensitivity=sensitivity, **options)[1]

    whole, thin = collect(), collect(max_tokens=max_tokens)
    kept = torch.cat([start + torch.arange(0, T - SINKS, stride) for start in (0, T - SINKS)])
    for name, every in vars(whole).items():
        few = getattr(thin, name)
        assert (every is None) == (few is None)
        assert every is None or torch.equal(few, every[kept])


def test_half_precision_gives_fp32_samples(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    exact = collect_samples(tiny_llama, windows, sink_tokens=SINKS)[1]
    found = collect_samples(tiny_llama.bfloat16(), windows, sink_tokens=SINKS)[1]
    for name, tensor in vars(found).items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == getattr(exact, name).shape
    # bf16 has 8 bits: a few roundings of 2**-8 in each of two layers.
    assert close(found.values, exact.values, relative=0.1)


@pytest.mark.parametrize(
    "shape", [(T,), (0, T), (2, SINKS + 1), (2, SINKS)], ids=["no rows", "none", "short", "shorter"]
)
def test_windows_that_leave_nothing_to_learn_from(
    tiny_llama: LlamaForCausalLM, shape: tuple[int, ...]
) -> None:
    windows = torch.full(shape, 5)
    with pytest.raises(DataError, match=f"at least {SINKS + 2} tokens, found") as caught:
        collect_samples(tiny_llama, windows, sink_tokens=SINKS)
    assert "--seq-len" in (caught.value.hint or "")
    shortest = collect_samples(tiny_llama, torch.full((2, SINKS + 2), 5), sink_tokens=SINKS)
    assert shortest[0].keys.shape[0] == 2 * 2


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "q_proj"])
def test_numbers_that_are_not_finite_name_the_layer(
    tiny_llama: LlamaForCausalLM, windows: Tensor, name: str
) -> None:
    with torch.no_grad():
        getattr(tiny_llama.model.layers[1].self_attn, name).weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"layer 1 hold .* NaN or infinite"):
        collect_samples(tiny_llama, windows, sensitivity=False)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("sensitivity", [True, False])
def test_the_model_is_left_as_it_was(
    tiny_llama: LlamaForCausalLM, windows: Tensor, sensitivity: bool, fails: bool
) -> None:
    model = tiny_llama.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    if fails:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    modes = [module.training for module in model.modules()]
    wanted = [weight.requires_grad for weight in model.parameters()]
    weights = [weight.clone() for weight in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    implementation = model.config._attn_implementation
    with torch.no_grad():
        stock = model(windows).logits
    if fails:
        with pytest.raises(CalibrationError):
            collect_samples(model, windows, sensitivity=sensitivity)
    else:
        collect_samples(model, windows, sensitivity=sensitivity)
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(weight.grad is None for weight in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.config._attn_implementation == implementation
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before.nan_to_num(), after.nan_to_num())
    with torch.no_grad():
        assert torch.equal(model(windows).logits.nan_to_num(), stock.nan_to_num())
