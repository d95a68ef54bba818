"""Prefill attention, kernel: many queries over one block of keys and values in plain numbers.

The running softmax lies in memory between blocks: largest score, sum of weights, weighted values.
The G query heads that share a key/value head are rows of one tile, G a token: every key is loaded
once a group.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kvq_kernels.scores import LOG2_E, soft_capped

SCAN_TILE: Final = tl.constexpr(1024)
"""Tokens whose visibility is looked at at a time."""

EVER: Final = tl.constexpr(2**31 - 1)
"""Index that no query has."""


@triton.jit
def _visible_range(seen_from, seen_until, first, last, tokens):
    """The smallest range of tokens that holds all that queries ``first`` to ``last`` see.

    One loop of ``tokens / 1024`` trips over eight bytes a token.
    """
    low = tokens
    high = 0
    for start in range(0, tokens, SCAN_TILE):
        place = start + tl.arange(0, SCAN_TILE)
        held = place < tokens
        seen = tl.load(seen_from + place, mask=held, other=EVER) <= last
        seen &= tl.load(seen_until + place, mask=held, other=-1) >= first
        seen &= held
        low = tl.minimum(low, tl.min(tl.where(seen, place, tokens), axis=0))
        high = tl.maximum(high, tl.max(tl.where(seen, place + 1, 0), axis=0))
    return low, high


# Numbers that differ from chunk to chunk: compiled once.
@triton.jit(do_not_specialize=["fresh", "index", "queries", "tokens"])
def attend_block(
    query,
    keys,
    values,
    seen_from,
    seen_until,
    output,
    largest,
    total,
    sink_logits,
    query_head_stride,
    query_token_stride,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    queries,
    tokens,
    index,
    fresh,
    score_scale,
    softcap,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    MASKED: tl.constexpr,
    LAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ``(tile, h)``: ROW_TILE rows, a row being a query token and head of the group.

    Args:
        query: ``[H * G, queries, D]``, any float dtype, channels side by side.
        keys, values: ``[H, tokens, D]``, channels side by side: f16 where PRECISION is "half",
            then products are f16 with f32 sums; else any float dtype, multiplied as f32 in that
            ``input_precision``.
        seen_from, seen_until: i32 ``[tokens]``: the query at index n of the row sees a token from
            the one up to the other, both included. Only read if MASKED; without, all queries see
            all tokens, whose number is a multiple of TOKEN_TILE.
        output: f32 ``[queries, H * G, D]``, weighted values; if LAST, attention.
        largest, total: f32 ``[queries, H * G]``, in units of ``exp2``; neither read if ``fresh``
            (1 or 0), nor written if LAST.
        sink_logits: f32 ``[H * G]``, read if LAST and SINK_LOGITS.
        index: of the first query in the row.
        score_scale: factor of scores: in units of ``exp2``, of the soft cap if SOFTCAP.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tile * ROW_TILE + tl.arange(0, ROW_TILE)
    token, query_head = row // G, head * G + row % G
    valid = token < queries
    channel = tl.arange(0, D_TILE)
    is_channel = (channel < D)[None, :]
    line = token.to(tl.int64)
    places = query + query_head[:, None].to(tl.int64) * query_head_stride
    places += line[:, None] * query_token_stride + channel[None, :]
    asked = tl.load(places, mask=valid[:, None] & is_channel, other=0.0).to(tl.float32)
    scale = tl.full([ROW_TILE], score_scale, tl.float32)
    if PRECISION == "half":
        # What f16 has to hold of a query is at most 1.
        size = tl.max(tl.abs(asked), axis=1)
        size = tl.where(size > 0, size, 1.0)
        asked = (asked / size[:, None]).to(tl.float16)
        scale *= size

    line = line * (H * G) + query_head
    places = output + line[:, None] * D + channel[None, :]
    before = valid & (fresh == 0)
    state_max = tl.load(largest + line, mask=before, other=-float("inf"))
    state_sum = tl.load(total + line, mask=before, other=0.0)
    state_out = tl.load(places, mask=before[:, None] & is_channel, other=0.0)

    low, high = 0, tokens
    if MASKED:
        first = tile * ROW_TILE // G
        last = tl.minimum((tile * ROW_TILE + ROW_TILE - 1) // G, queries - 1)
        low, high = _visible_range(seen_from, seen_until, index + first, index + last, tokens)
        low = low // TOKEN_TILE * TOKEN_TILE
    keys += head.to(tl.int64) * key_head_stride
    values += head.to(tl.int64) * value_head_stride
    for start in range(low, high, TOKEN_TILE):
        place = start + tl.arange(0, TOKEN_TILE)
        loaded = is_channel
        if MASKED:
            loaded = loaded & (place < tokens)[:, None]
        key_places = keys + place.to(tl.int64)[:, None] * key_token_stride + channel[None, :]
        key = tl.load(key_places, mask=loaded, other=0.0)
        if PRECISION == "half":
            scores = tl.dot(asked, tl.trans(key))
        else:
            scores = tl.dot(asked, tl.trans(key.to(tl.float32)), input_precision=PRECISION)
        scores *= scale[:, None]
        if SOFTCAP:
            scores = soft_capped(scores, softcap)
        if MASKED:
            held = place < tokens
            opens = tl.load(seen_from + place, mask=held, other=EVER)
            closes = tl.load(seen_until + place, mask=held, other=-1)
            number = index + token
            seen = (opens[None, :] <= number[:, None]) & (number[:, None] <= closes[None, :])
            scores = tl.where(seen, scores, -float("inf"))
        merged = tl.maximum(state_max, tl.max(scores, axis=1))
        # Where nothing has been seen yet the exponent must not become inf - inf.
        finite = tl.where(merged == -float("inf"), 0.0, merged) if MASKED else merged
        weight = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(state_max - finite)
        state_sum = state_sum * decay + tl.sum(weight, axis=1)
        state_out *= decay[:, None]
        value_places = values + place.to(tl.int64)[:, None] * value_token_stride + channel[None, :]
        value = tl.load(value_places, mask=loaded, other=0.0)
        if PRECISION == "half":
            state_out = tl.dot(weight.to(tl.float16), value, state_out)
        else:
            state_out = tl.dot(weight, value.to(tl.float32), state_out, input_precision=PRECISION)
        state_max = merged

    if LAST:
        if SINK_LOGITS:
            logit = tl.load(sink_logits + query_head) * LOG2_E
            merged = tl.maximum(state_max, logit)
            finite = tl.where(merged == -float("inf"), 0.0, merged)
            decay = tl.exp2(state_max - finite)
            state_sum = state_sum * decay + tl.exp2(logit - finite)
            state_out *= decay[:, None]
        state_out /= tl.where(state_sum > 0, state_sum, 1.0)[:, None]
    else:
        tl.store(largest + line, state_max, mask=valid)
        tl.store(total + line, state_sum, mask=valid)
    tl.store(places, state_out, mask=valid[:, None] & is_channel)
