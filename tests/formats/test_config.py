"""Options of a cache, and the widths of single layers among them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvq_formats.config import KVQConfig, widths_in_words
from kvq_formats.errors import ConfigError

LAYER_BITS = {7: (2, 4), 0: (3, 2), 1: (3, 2)}


def mixed(**options: Any) -> KVQConfig:
    return KVQConfig.create(**options).with_layer_bits(LAYER_BITS)


def test_the_widths_for_all_are_the_largest() -> None:
    config = mixed(outlier_fraction=0.02)
    assert (config.key_bits, config.value_bits) == (3, 4)
    assert list(config.layer_bits.items()) == [(0, (3, 2)), (1, (3, 2)), (7, (2, 4))]
    assert config.outlier_fraction == 0.02


def test_a_layer_has_a_config_of_its_own() -> None:
    config = mixed(sink_tokens=3)
    assert config.for_layer(7) == KVQConfig(key_bits=2, value_bits=4, sink_tokens=3)
    assert config.for_layer(0) == KVQConfig(key_bits=3, value_bits=2, sink_tokens=3)
    counts = {config.for_layer(0): 2, config.for_layer(7): 1}
    assert config.layer_counts() == counts


def test_layers_that_are_alike() -> None:
    config = KVQConfig(key_bits=2, value_bits=3)
    assert config.for_layer(99) == config
    assert config.layer_counts() == {config: 1}
    assert mixed(key_bits=2).with_layer_bits({}).layer_bits == {}
    assert "layer_bits" not in config.model_dump()
    assert "layer_bits" not in config.model_dump_json()


def test_a_layer_without_widths() -> None:
    with pytest.raises(ConfigError, match="no widths for layer 2, only for 0, 1, 7"):
        mixed().for_layer(2)


def test_equal_configs_have_equal_hashes() -> None:
    config = mixed()
    read = KVQConfig.model_validate(json.loads(config.model_dump_json()))
    assert read == config
    assert hash(read) == hash(config)
    assert config.model_copy(update={"layer_bits": LAYER_BITS}) == config
    assert hash(config.model_copy(update={"layer_bits": LAYER_BITS})) == hash(config)
    other = KVQConfig(key_bits=3, value_bits=4)
    assert config != other
    assert len({config, read, other}) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_bits": 2, "value_bits": 2, "layer_bits": {0: (2, 5)}}, r"layer_bits\.0\.1 is 5"),
        ({"layer_bits": {0: (4, 4), 1: (4, 1)}}, r"layer_bits\.1\.1 is 1"),
        ({"layer_bits": {-1: (4, 4)}}, "greater than or equal to 0"),
        ({"layer_bits": {0: (4,)}}, "required"),
        ({"layer_bits": {0: (4, 2)}}, "value_bits is 4, but the largest of the layers is 2"),
        ({"key_bits": 2, "layer_bits": {0: (3, 4)}}, "key_bits is 2, but .* layers is 3"),
        ({"key_bits": 5, "layer_bits": {0: (4, 4)}}, "option key_bits is 5"),
    ],
)
def test_widths_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KVQConfig.create(**options)


@pytest.mark.parametrize("widths", [(1, 2), (2, 5)])
def test_widths_that_no_code_has(widths: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="input should be 2, 3 or 4"):
        KVQConfig().with_layer_bits({0: widths})


def test_words() -> None:
    assert widths_in_words([3, 3]) == "3 bits"
    assert widths_in_words([2, 2, 3, 4]) == "2-4 bits (2.75 on average)"
    assert widths_in_words([2, 2, 3]) == "2-3 bits (2.333 on average)"
    assert KVQConfig(key_bits=2, value_bits=3).bits_in_words() == ("2 bits", "3 bits")
    # Keys 3, 3 and 2 bits: 8/3; values 2, 2 and 4.
    assert mixed().bits_in_words() == (
        "2-3 bits (2.667 on average)",
        "2-4 bits (2.667 on average)",
    )
