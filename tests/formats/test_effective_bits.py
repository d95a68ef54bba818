"""Bits are counted from bytes that are allocated, and meet the bars they were designed for."""

from __future__ import annotations

import pytest
import torch

from kvq_formats.config import KVQConfig
from kvq_formats.effective_bits import effective_bits
from kvq_formats.pages import KeyPages, ValuePages, allocated_bytes

TOKENS = 32_768


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("H", "D", "settled", "whole"),
    [(8, 128, 0.37, 0.50), (32, 128, 0.37, 0.50), (2, 64, 0.47, 0.65)],
)
def test_one_percent_of_outliers_costs_less_than(
    bits: int, H: int, D: int, settled: float, whole: float
) -> None:
    config = KVQConfig(key_bits=bits, value_bits=bits)
    found = effective_bits(config, num_kv_heads=H, head_dim=D, tokens=TOKENS)
    assert found.without_unfinished <= bits + settled
    assert found.total <= bits + whole


def test_counted_bytes_are_the_bytes_of_real_pages() -> None:
    config = KVQConfig(key_bits=3, value_bits=2, sink_tokens=4, recent_tokens=100)
    H, D = 2, 64
    found = effective_bits(config, num_kv_heads=H, head_dim=D, tokens=1000)
    pages = (1000 - 4 - 100) // 256
    real = [
        sum(
            allocated_bytes(
                kind.allocate(config, num_pages=pages, num_kv_heads=H, head_dim=D)
            ).values()
        )
        for kind in (KeyPages, ValuePages)
    ]
    loose = 2 * H * D * 2 * (4 + 100 + 256)
    block_table = 4 * pages
    bits = 8 * (sum(real) + loose + block_table) / (1000 * 2 * H * D)
    assert found.total == pytest.approx(bits)
    parts = (found.codes, found.scales, found.outliers, found.positions, found.sinks)
    assert sum(parts) + found.recent + found.unfinished == pytest.approx(found.total)


def test_codes_alone_are_the_nominal_width() -> None:
    config = KVQConfig(key_bits=4, value_bits=2, outlier_fraction=0.0, sink_tokens=0)
    found = effective_bits(config, num_kv_heads=2, head_dim=64, tokens=256 * 10)
    assert found.codes == pytest.approx(3.0)
    assert found.outliers == 0
    assert found.scales == pytest.approx(32 / 128 / 2)


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257])
def test_short_texts_have_finite_bits(tokens: int) -> None:
    found = effective_bits(KVQConfig(), num_kv_heads=2, head_dim=64, tokens=tokens)
    assert torch.isfinite(torch.tensor(found.total))
    assert found.codes == 0 if tokens < 257 else found.codes > 0


def test_layers_of_different_widths_count_each_by_its_own() -> None:
    config = KVQConfig(outlier_fraction=0.0, sink_tokens=0)
    config = config.with_layer_bits({0: (2, 2), 3: (2, 2), 5: (4, 3)})
    # Ten pages, and nothing beside them, of 2 x 2 x 64 numbers a token.
    found = effective_bits(config, num_kv_heads=2, head_dim=64, tokens=256 * 10)
    # A key and a value: (2 + 2) / 2 bits twice, (4 + 3) / 2 once.
    assert found.codes == pytest.approx((2 + 2 + 3.5) / 3)
    assert found.key_bits == pytest.approx((2 + 2 + 4) / 3)
    # A token's 128 values share 32 bits.
    assert found.value_bits == pytest.approx((2 + 2 + 3) / 3 + 0.25)
    # Beside codes: half of those 32 bits a number, and 8 bytes a page of 65,536 numbers.
    assert found.without_unfinished == pytest.approx(2.5 + 0.125 + 64 / 65_536)
    assert found.tokens == 2560
    # 1,024 bytes, and 5 an entry of codebooks: of 4 + 4 entries twice, of 16 + 8 once.
    # Feedback: gains of 64 * 63 / 2 pairs and 64 places of 2 bytes, 64 shifts of 4, in 2 heads,
    # twice.
    feedback = 2 * 2 * (2 * (64 * 63 // 2 + 64) + 4 * 64)
    assert found.table_bytes == round((1064 + 1064 + 1144) / 3) + feedback


def test_layers_of_one_width_count_as_one() -> None:
    alike = KVQConfig(key_bits=3, value_bits=2)
    named = alike.with_layer_bits(dict.fromkeys(range(7), (3, 2)))
    sizes = {"num_kv_heads": 2, "head_dim": 64, "tokens": 1000}
    assert effective_bits(named, **sizes) == effective_bits(alike, **sizes)
