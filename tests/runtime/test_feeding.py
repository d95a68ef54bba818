"""In f32: the same codes and the same logits however a prompt is fed, up to roundings.

The runtime rule has two halves, and each has its own bound.

*Same tokens, same bytes.* A page is a function of its tokens' keys and values. Two feedings compute
these in sums of another shape and so differ by roundings; what they store may differ only where a
decision's boundary lies between the two numbers, widened by the roundings of the codec's own
arithmetic (``support/rounding.py``: no free constant).

*Same bytes, same numbers.* Let feedings store the same numbers. Then all their keys, values and
logits have one truth: attention written down plainly, each query with its own choice between codes
and exact tokens, in f64. The same in f32 misses it by M. A feeding sums the same terms in another
order, for which error analysis has the same bound (``gamma_n`` for n terms in any order), and what
splits and decoding add is less than that sum again: it is within 2 M of the truth, and two feedings
are within 4 M of each other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from feeding import (
    CHUNKS,
    PROMPT,
    SIDECARS,
    TOKENS,
    Fed,
    compare,
    feed,
    joined,
    misses,
    model,
    near,
    plain_misses,
    recording,
    sidecar,
    truth,
    unexplained,
    whole,
)
from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.attach import attach
from kvq_runtime.cache import packed_layers
from kvq_runtime.page_pool import PagePool
from rounding import Tally, explain_keys, explain_values, paged

KINDS = [
    *(f"key {kind}" for kind in ("code", "outlier", "residual")),
    *(f"value {kind}" for kind in ("scale", "code", "outlier", "residual")),
]


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("name", SIDECARS)
def test_bytes_differ_only_where_roundings_decide(name: str, size: int) -> None:
    # One by one from the first token on: with a sidecar of each width.
    head = 500 if (name, size) == ("roomy", 1) else 0
    found = compare(whole(name), feed(sidecar(name), size, whole_first=head), name)
    assert not unexplained(found)
    assert all(found[f"{index} {kind}"].compared > 0 for index in (0, 1) for kind in KINDS)


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("length", [1, 255, 256, 257, 258])
def test_about_the_end_of_the_first_page(length: int, size: int) -> None:
    """The page is packed, and read from its codes, by the 258th token: one is a sink."""
    given, ids = sidecar("2"), PROMPT[:, :length]
    once = feed(given, length, ids)
    # One by one from the first token on: above.
    chunked = feed(given, size, ids, whole_first=max(0, length - 30) if size == 1 else 0)
    assert len(once.pages(0)) == (2 if length == 258 else 0)
    assert not unexplained(compare(once, chunked, "2"))
    # And as if more tokens had followed.
    before = slice(min(length, 257))
    found = near(chunked.logits[before], whole("2").logits[before], 4 * plain_misses("2")[-1])
    assert found.unexplained == 0
    assert found.compared == 320 * before.stop


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("name", SIDECARS)
def test_where_bytes_agree_so_do_keys_values_and_logits(name: str, size: int) -> None:
    """All tokens of three pages; each chunk is stored as the whole prompt was."""
    given, expected = sidecar(name), whole(name)
    # One by one all of them are fed above; here the last of them will do.
    chunked = feed(given, size, held=expected, whole_first=700 if size < 64 else 0)
    assert_same_bytes(chunked, expected)
    for found in (expected, chunked):
        for miss, plain in zip(misses(found, truth(name)), plain_misses(name), strict=True):
            assert miss <= 2 * plain
    # Now nothing but roundings moves any layer's inputs, and hardly a boundary is met.
    for layer, numbers, twins in zip(chunked.layers, expected.inputs, chunked.inputs, strict=True):
        exact, moved = (
            [x[:, 1 : 1 + 2 * PAGE_TOKENS] for x in inputs] for inputs in (numbers, twins)
        )
        found = explain_encoded(layer.codec, exact, moved, claimed=moved)
        assert not unexplained(found)
        decisions = sum(tally.compared for tally in found.values())
        assert sum(tally.open for tally in found.values()) < 1e-3 * decisions


def assert_same_bytes(a: Fed, b: Fed) -> None:
    for index in (0, 1):
        for pages, twins in zip(a.pages(index), b.pages(index), strict=True):
            assert all(torch.equal(x, vars(twins)[name]) for name, x in vars(pages).items())


@torch.no_grad()
def test_generate_feeds_as_everything_else_does() -> None:
    given, prompt = sidecar("3 head"), PROMPT[:, :500]
    past = DynamicCache()
    with attach(model(), given), recording() as seen:
        out = model().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=past,
            max_new_tokens=60,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    # The last token was never fed.
    ids = out.sequences[:, :-1]
    assert ids.shape[1] > 520
    once = feed(given, ids.shape[1], ids)
    logits = torch.cat([once.logits[:499], *out.logits])
    generated = Fed(logits, joined(seen), list(packed_layers(past)))
    found = compare(once, generated, "3 head")
    assert not unexplained(found)
    assert found["logits"].differing > 0


# The comparison itself.


def test_pools_are_full_and_are_not() -> None:
    for name in SIDECARS:
        keys, values = whole(name).pages(1)
        full = keys.outlier_counts.sum(-1) == keys.outliers.shape[-1]
        full_lists = values.outlier_offsets[..., -1].int() == values.outliers.shape[-1]
        assert full.all() == full_lists.any() == (name != "roomy")
        assert keys.outlier_counts.sum() > 0


@pytest.mark.parametrize("name", SIDECARS)
def test_every_kind_of_decision_falls_otherwise_and_is_explained(name: str) -> None:
    """For entries moved by a 64th of themselves; and not if one claims that they did not move."""
    fed = whole(name)
    for layer, given in zip(fed.layers, fed.inputs, strict=True):
        exact = [x[:, 1 : 1 + 2 * PAGE_TOKENS] for x in given]
        noise = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(2))
        moved = [x * (1 + noise / 64) for x in exact]
        honest = explain_encoded(layer.codec, exact, moved, claimed=moved)
        false = explain_encoded(layer.codec, exact, moved, claimed=exact)
        assert list(honest) == list(false) == KINDS
        for kind in KINDS:
            assert honest[kind].differing > 0, kind
            assert honest[kind].unexplained == 0, kind
            assert false[kind].unexplained > 0, kind


def explain_encoded(
    codec: Any, exact: list[Tensor], moved: list[Tensor], *, claimed: list[Tensor]
) -> dict[str, Tally]:
    """Pages of ``exact`` against those of ``moved``, said to be made of ``claimed``."""
    pages = list(zip(codec.encode(*exact), codec.encode(*moved), strict=True))
    keys, values = (
        tuple(paged(x, sinks=0, pages=2) for x in both) for both in zip(exact, claimed, strict=True)
    )
    found = explain_keys(keys, pages[0], codec.parameters.key, codec.config)
    return found | explain_values(values, pages[1], codec.parameters.value, codec.config)


def test_a_neighbours_value_in_a_page_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = PagePool.write

    def write(
        pool: PagePool, pages: Any, keys: Tensor, values: Tensor, positions: Tensor, **how: Any
    ) -> None:
        values = values.clone()
        values[0, 100] = values[0, 101]
        stock(pool, pages, keys, values, positions, **how)

    expected = whole("3 head")
    monkeypatch.setattr(PagePool, "write", write)
    found = unexplained(compare(expected, feed(sidecar("3 head"), 256), "3 head"))
    assert {"0 value scale", "0 value code"} <= set(found)
    assert not {"0 keys", "0 values", "0 key code"} & set(found)


def test_a_chunk_that_reads_its_own_pages_exactly_is_found() -> None:
    """The first layer stores the same bytes; it is what comes of them that differs."""
    expected = whole("2")
    exact = feed(sidecar("2"), TOKENS, rule="exact-prefill")
    found = unexplained(compare(expected, exact, "2"))
    assert {"1 keys", "1 values"} <= set(found) <= {"1 keys", "1 values", "logits"}
    # Nor does it pass where the bytes are made to agree.
    exact = feed(sidecar("2"), TOKENS, rule="exact-prefill", held=expected)
    assert misses(exact, expected)[-1] > 1000 * plain_misses("2")[-1]
