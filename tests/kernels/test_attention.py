"""Attention over pages, tail and merge against a plain softmax in f64 over what the rule says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_formats.config import PAGE_TOKENS
from kvq_kernels import attention
from kvq_kernels.attention import AttentionOptions, DecodedPages, ExactTokens, attend

EPS = torch.finfo(torch.float32).eps
D = 16


@dataclass
class Case:
    """A row: what its pages decode to, the exact numbers of all its tokens, and T new queries."""

    query: Tensor
    keys: Tensor
    values: Tensor
    decoded_keys: Tensor
    decoded_values: Tensor
    sinks: int
    lengths: list[int]
    held: int
    recent: int
    half_range: Tensor | None = None
    center: Tensor | None = None

    @property
    def ends(self) -> list[int]:
        total, ends = self.sinks, []
        for length in self.lengths:
            total += length
            ends.append(total - 1)
        return ends

    @property
    def start(self) -> int:
        return self.sinks + sum(self.lengths[: self.held])

    def read(self, first: int, last: int) -> DecodedPages:
        begin = self.sinks + sum(self.lengths[:first])
        H = self.keys.shape[0]
        keys = torch.full((last - first, H, PAGE_TOKENS, D), 1e4)
        values = torch.full((last - first, H, PAGE_TOKENS, D), 1e4)
        for place, length in enumerate(self.lengths[first:last]):
            span = slice(begin, begin + length)
            keys[place, :, :length] = self.decoded_keys[:, span]
            values[place, :, :length] = self.decoded_values[:, span]
            begin += length
        half_range = center = None
        if self.half_range is not None:
            half_range, center = self.half_range[first:last], self.center[first:last]
            values = (values - center[..., None]) / half_range[..., None]
        return DecodedPages(keys, values.mT.contiguous(), half_range, center)

    def attend(self, options: AttentionOptions, *, exact_prefill: bool = False) -> Tensor:
        start = self.start
        exact = ExactTokens(
            keys=torch.cat([self.keys[:, : self.sinks], self.keys[:, start:]], dim=1),
            values=torch.cat([self.values[:, : self.sinks], self.values[:, start:]], dim=1),
            sinks=self.sinks,
            start=start,
        )
        return attend(
            self.query,
            index=self.keys.shape[1] - self.query.shape[1],
            pages=self,
            held_pages=self.held,
            exact=exact,
            recent_tokens=self.recent,
            options=options,
            exact_prefill=exact_prefill,
        )

    def expected(self, options: AttentionOptions, *, exact_prefill: bool = False) -> Tensor:
        """By the words of the rule, one query at a time, f64."""
        HQ, T, _ = self.query.shape
        H, N, _ = self.keys.shape
        outputs = []
        for t in range(T):
            n = N - T + t
            keys, values = self.keys.double().clone(), self.values.double().clone()
            begin = self.sinks
            for place, end in enumerate(self.ends):
                span = slice(begin, end + 1)
                coded = end < n - self.recent and not exact_prefill
                if coded or place < self.held:
                    keys[:, span] = self.decoded_keys[:, span].double()
                    values[:, span] = self.decoded_values[:, span].double()
                begin = end + 1
            keys, values = (x[:, : n + 1].repeat_interleave(HQ // H, 0) for x in (keys, values))
            scores = (keys @ self.query[:, t, :, None].double())[..., 0] * options.scaling
            if options.softcap:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sink_logits is not None:
                scores = torch.cat([scores, options.sink_logits.double()[:, None]], dim=1)
            weights = scores.softmax(-1)[:, : n + 1]
            outputs.append((weights[:, None] @ values)[:, 0])
        return torch.stack(outputs)


def make_case(
    *,
    H: int = 2,
    G: int = 2,
    T: int = 1,
    sinks: int = 1,
    lengths: tuple[int, ...] = (),
    tail: int = 5,
    held: int | None = None,
    recent: int = 0,
    scales: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    N = sinks + sum(lengths) + tail
    pages = len(lengths)
    half_range = center = None
    if scales:
        half_range = numbers(pages, 1, PAGE_TOKENS).abs() + 0.5
        center = numbers(pages, 1, PAGE_TOKENS)
    return Case(
        query=numbers(H * G, T, D),
        keys=numbers(H, N, D),
        values=numbers(H, N, D),
        decoded_keys=numbers(H, N, D),
        decoded_values=numbers(H, N, D),
        sinks=sinks,
        lengths=list(lengths),
        held=pages if held is None else held,
        recent=recent,
        half_range=half_range,
        center=center,
    )


def assert_close(case: Case, options: AttentionOptions, *, exact_prefill: bool = False) -> None:
    found = case.attend(options, exact_prefill=exact_prefill)
    expected = case.expected(options, exact_prefill=exact_prefill)
    # A score sums D products, off by D eps times the sum of their sizes, and moves its weight by
    # that factor twice (its own and the total's); a weighted sum of N values, split or not, adds
    # N eps. Values in units of half-range and centre cancel, which the last factor allows for.
    product = (case.query.abs().amax() * D * max(case.keys.abs().amax(), 1e-3)).item()
    sizes = product * options.scaling
    N = case.keys.shape[1]
    largest = max(case.values.abs().amax(), case.decoded_values.abs().amax()).item()
    cancelling = 8 if case.half_range is not None else 1
    bound = EPS * (2 * D * sizes + N) * largest * cancelling
    assert found.dtype == torch.float32
    assert (found - expected).abs().max().item() <= bound


OPTIONS = AttentionOptions(scaling=0.3)


@pytest.mark.parametrize("tail", [1, 2, 255, 256])
@pytest.mark.parametrize("lengths", [(), (256,), (256, 256, 256)])
@pytest.mark.parametrize("scales", [False, True])
def test_one_query(tail: int, lengths: tuple[int, ...], scales: bool) -> None:
    assert_close(make_case(lengths=lengths, tail=tail, scales=scales), OPTIONS)


@pytest.mark.parametrize(
    ("softcap", "with_sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)]
)
@pytest.mark.parametrize("T", [1, 7])
def test_softcap_and_learned_sinks(softcap: float | None, with_sinks: bool, T: int) -> None:
    case = make_case(lengths=(256,), tail=9, T=T)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(5)) if with_sinks else None
    assert_close(case, AttentionOptions(scaling=0.4, softcap=softcap, sink_logits=logits))


@pytest.mark.parametrize(("H", "G"), [(1, 1), (1, 4), (3, 1), (2, 8)])
def test_group_sizes(H: int, G: int) -> None:
    assert_close(make_case(H=H, G=G, lengths=(256,), tail=30, T=3, scales=True), OPTIONS)


@pytest.mark.parametrize("recent", [0, 1, 100, 300])
def test_each_query_of_a_chunk_sees_by_its_own_limit(recent: int) -> None:
    # 700 new tokens that completed two pages beside the one that was held.
    tail = 700 - 2 * PAGE_TOKENS + 40
    case = make_case(lengths=(256, 256, 256), held=1, tail=tail, T=700, recent=recent)
    assert_close(case, OPTIONS)


def test_exact_prefill_reads_the_chunk_exactly() -> None:
    case = make_case(lengths=(256, 256, 256), held=1, tail=20, T=520)
    assert_close(case, OPTIONS, exact_prefill=True)
    assert not torch.allclose(case.attend(OPTIONS), case.attend(OPTIONS, exact_prefill=True))


def test_a_page_that_was_cut_hides_what_is_behind() -> None:
    assert_close(make_case(lengths=(256, 17, 256, 1), tail=3, T=2), OPTIONS)


def test_held_pages_are_read_from_codes_even_within_the_recent_tokens() -> None:
    """After a crop their exact numbers are gone."""
    assert_close(make_case(lengths=(256, 30), tail=4, T=2, recent=64), OPTIONS)


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("T", [1, 3])
def test_nothing_but_new_tokens(sinks: int, T: int) -> None:
    assert_close(make_case(sinks=sinks, tail=T, T=T), OPTIONS)


def test_queries_among_the_sinks() -> None:
    assert_close(make_case(sinks=6, tail=0, T=4), OPTIONS)


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(lengths=(256,) * 5, held=3, tail=100, T=600, scales=True)
    whole = case.attend(OPTIONS)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 37)
    monkeypatch.setattr(attention, "DECODED_BLOCK_BYTES", 1)
    monkeypatch.setattr(attention, "SCORE_BLOCK_BYTES", 1)
    assert_close(case, OPTIONS)
    assert (case.attend(OPTIONS) - whole).abs().max() <= 64 * EPS * case.values.abs().max()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.one_of(st.just(256), st.integers(1, 256)), max_size=3),
    T=st.integers(1, 40),
    extra=st.integers(0, 50),
    sinks=st.integers(0, 3),
    recent=st.sampled_from([0, 1, 13, 256, 400]),
    G=st.integers(1, 3),
    seed=st.integers(0, 10),
)
def test_any_row(
    lengths: list[int], T: int, extra: int, sinks: int, recent: int, G: int, seed: int
) -> None:
    case = make_case(
        lengths=tuple(lengths), T=T, tail=T + extra, sinks=sinks, recent=recent, G=G, seed=seed
    )
    assert_close(case, OPTIONS)


def test_scores_far_apart_stay_finite() -> None:
    """Blocks whose scores differ by thousands neither overflow nor lose the larger one."""
    case = make_case(lengths=(256, 256), tail=3)
    case.decoded_keys[:, 1:257] *= 1e3
    case.keys[:, -3:] *= 1e3
    found = case.attend(OPTIONS)
    assert found.isfinite().all()
    assert torch.allclose(found, case.expected(OPTIONS).float(), atol=1e-3)
