from __future__ import annotations

from itertools import count

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_formats.config import PAGE_TOKENS
from kvq_runtime.rows import Row, attended_mask


def test_a_new_row_is_empty() -> None:
    row = Row()
    assert (row.tokens, row.tail_start, row.tail) == (0, 0, 0)
    assert row.crop(0) == []


def test_spans_that_touch_become_one() -> None:
    row = Row()
    row.attend(2, 5)
    row.attend(5, 6)
    row.attend(8, 9)
    assert row.attended == [(2, 6), (8, 9)]
    assert attended_mask([row, Row()], 10).tolist() == [
        [False, False, True, True, True, True, False, False, True, False],
        [False] * 10,
    ]


def test_cropping_into_a_page_cuts_it_and_frees_what_follows() -> None:
    row = Row(attended=[(0, 1 + 3 * 256 + 7)], sinks=1, tail=7)
    row.tail = 0
    row.add_pages([4, 5, 6])
    row.tail = 7
    assert row.tokens == 1 + 3 * 256 + 7
    # Within the tail, then to a page's last token, then into a page.
    assert row.crop(1 + 3 * 256 + 2) == []
    assert row.tail == 2
    assert row.crop(1 + 3 * 256) == []
    assert (row.tail, row.lengths) == (0, [256, 256, 256])
    assert row.crop(1 + 256 + 10) == [6]
    assert (row.pages, row.lengths, row.ends) == ([4, 5], [256, 10], [256, 266])
    row.add_pages([9])
    assert row.ends[-1] == 266 + 256
    assert row.crop(1) == [9, 5, 4]
    assert (row.tokens, row.sinks) == (1, 1)
    assert row.crop(0) == []
    assert row.tokens == 0


def test_a_copy_is_a_row_of_its_own() -> None:
    row = Row(attended=[(0, 300)], sinks=1)
    row.add_pages([0])
    row.tail = 43
    copied = row.copy()
    copied.crop(5)
    assert (row.tokens, copied.tokens) == (300, 5)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(0, 700), st.integers(0, 5)),
            st.tuples(st.just("crop"), st.integers(0, 2500), st.just(0)),
        ),
        max_size=12,
    ),
    st.integers(0, 3),
)
def test_whatever_happens_tokens_are_counted(steps: list[tuple[str, int, int]], sinks: int) -> None:
    """Fed with padding in front, packed greedily, cropped anywhere: against a list of slots."""
    row, ids, slots = Row(), count(), []
    for what, size, padding in steps:
        if what == "crop":
            kept = min(size, len(slots))
            freed = row.crop(kept)
            slots = slots[:kept]
            assert not set(freed) & set(row.pages)
        else:
            begin = len(slots) + padding
            slots += [False] * padding + [True] * size
            if size:
                row.attend(begin, begin + size)
            new = min(size, sinks - row.sinks) if row.sinks < sinks else 0
            row.sinks += new
            row.tail += size - new
            while row.tail > PAGE_TOKENS:
                row.tail -= PAGE_TOKENS
                row.add_pages([next(ids)])
        assert row.tokens == sum(slots)
        assert attended_mask([row], len(slots))[0].tolist() == slots
        assert all(0 < length <= PAGE_TOKENS for length in row.lengths)
        assert row.ends == [
            row.sinks + sum(row.lengths[: place + 1]) - 1 for place in range(len(row.pages))
        ]
        assert not row.pages or row.sinks == sinks
        assert row.tail >= 0


def test_masks_of_no_slots() -> None:
    assert attended_mask([Row(), Row()], 0).shape == (2, 0)
    assert attended_mask([Row()], 0).dtype == torch.bool
