"""``attach``: the right sidecar on the right model, for as long as the context is open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from garbage import with_garbage_codebooks
from kvq_formats import pages
from kvq_formats.errors import (
    ConfigError,
    FingerprintMismatchError,
    KVQError,
    SidecarError,
)
from kvq_runtime.attach import AttachRule, attach
from kvq_runtime.sidecar_codec import SidecarCodec
from tiny_models import make_tiny_llama
from tiny_sidecars import make_sidecar


def ids(tokens: int = 300) -> Tensor:
    return torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_plain_forward_attends_over_decoded_pages() -> None:
    model = make_tiny_llama()
    stock = model(ids()).logits
    errors = []
    for bits in (2, 3, 4):
        with attach(model, make_sidecar(bits), rule="evaluation") as attached:
            assert attached is model
            errors.append(float((model(ids()).logits - stock).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert torch.equal(model(ids()).logits, stock)


@pytest.mark.parametrize("tokens", [1, 2, 256, 257, 258])
@torch.no_grad()
def test_odd_lengths(tokens: int) -> None:
    model = make_tiny_llama()
    stock = model(ids(tokens)).logits
    with attach(model, make_sidecar(), rule="evaluation"):
        quantized = model(ids(tokens)).logits
    assert torch.isfinite(quantized).all()
    # The first token is the sink and sees nothing but itself.
    assert torch.equal(quantized[:, 0], stock[:, 0])
    assert tokens == 1 or not torch.equal(quantized, stock)


def test_every_number_goes_through_packed_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that is flipped in the packed words reaches the logits."""
    model = make_tiny_llama()
    with torch.no_grad(), attach(model, make_sidecar(), rule="evaluation"):
        before = model(ids()).logits
        packed = pages.packing.pack_values
        monkeypatch.setattr(
            pages.packing, "pack_values", lambda codes, *, bits: packed(codes, bits=bits) ^ 1
        )
        after = model(ids()).logits
    assert not torch.equal(before, after)


def test_codec_keeps_what_the_sidecar_says() -> None:
    codec = SidecarCodec(make_sidecar(sink_tokens=3, recent_tokens=17))
    assert (codec.sink_tokens, codec.recent_tokens, codec.rotated_keys) == (3, 17, False)
    assert set(codec.layers) == {0, 1}


def test_a_saved_sidecar_does_the_same(tmp_path: Path) -> None:
    model = make_tiny_llama()
    make_sidecar().save(tmp_path / "s")
    with torch.no_grad():
        with attach(model, make_sidecar(), rule="evaluation"):
            expected = model(ids()).logits
        with attach(model, tmp_path / "s", rule="evaluation"):
            assert torch.equal(model(ids()).logits, expected)


def test_the_sidecar_of_another_model_is_refused() -> None:
    other = make_tiny_llama(num_hidden_layers=3)
    with (
        pytest.raises(FingerprintMismatchError, match="3 layers"),
        attach(other, make_sidecar(), rule="evaluation"),
    ):
        pass


def test_a_missing_sidecar_and_an_unknown_rule(tmp_path: Path) -> None:
    model = make_tiny_llama()
    with pytest.raises(SidecarError), attach(model, tmp_path / "none", rule="evaluation"):
        pass
    with (
        pytest.raises(ConfigError, match=r"'exact'.*'exact-prefill'") as caught,
        attach(model, make_sidecar(), rule="exact"),  # type: ignore[arg-type]
    ):
        pass
    assert caught.value.hint == 'rule="runtime"'


@torch.no_grad()
def test_a_garbage_codebook_wrecks_the_logits() -> None:
    model = make_tiny_llama()
    good = make_sidecar()
    stock = model(ids(1000)).logits
    with attach(model, good, rule="evaluation"):
        near = (model(ids(1000)).logits - stock).square().mean()
    with attach(model, with_garbage_codebooks(good), rule="evaluation"):
        far = (model(ids(1000)).logits - stock).square().mean()
    assert far > 30 * near


@pytest.mark.parametrize("rule", ["runtime", "evaluation", "exact-prefill"])
@torch.no_grad()
def test_entered_twice_is_refused_and_what_is_open_stays(rule: AttachRule) -> None:
    model, sidecar = make_tiny_llama(), make_sidecar()
    prompt = ids(40)
    stock = model(prompt).logits
    attachment = attach(model, sidecar, rule=rule)
    with attachment:
        attached = model(prompt).logits
        for again in (attachment, attach(model, sidecar)):
            with pytest.raises(KVQError, match="attached") as caught, again:
                pass
            assert caught.value.hint
        assert torch.equal(model(prompt).logits, attached)
    assert torch.equal(model(prompt).logits, stock)
    # Left, it can be entered again.
    with attachment:
        assert torch.equal(model(prompt).logits, attached)
    assert torch.equal(model(prompt).logits, stock)
