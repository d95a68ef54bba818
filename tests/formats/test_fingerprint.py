from __future__ import annotations

from typing import Any

import pytest

from kvq_formats.errors import FingerprintMismatchError, UnsupportedModelError
from kvq_formats.fingerprint import Fingerprint, check, explain
from kvq_formats.records import BaseModelRecord

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def fingerprint(**changes: Any) -> Fingerprint:
    return Fingerprint.from_config({**LLAMA, **changes})


def record(
    id: str = "meta-llama/Llama-3.1-8B", revision: str | None = "a" * 40, **changes: Any
) -> BaseModelRecord:
    return BaseModelRecord(id=id, revision=revision, fingerprint=fingerprint(**changes))


def test_reads_a_plain_config() -> None:
    found = fingerprint()
    assert (found.num_hidden_layers, found.num_kv_heads, found.head_dim) == (32, 8, 128)
    assert found.rope == {"rope_type": "default", "rope_theta": 500000.0}
    assert found.layer_types is None
    assert found.sliding_window is None
    assert not found.qk_norm
    assert found.summary == "32 layers, 8 KV heads, head_dim 128"


def test_missing_numbers_follow_from_others() -> None:
    config = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
    found = Fingerprint.from_config(config)
    assert found.num_kv_heads == 32
    assert found.head_dim == 128
    assert Fingerprint.from_config({**LLAMA, "head_dim": None}).head_dim == 128


@pytest.mark.parametrize(
    ("flags", "kv_heads"),
    [
        ({"new_decoder_architecture": False, "multi_query": True}, 1),
        ({"new_decoder_architecture": False, "multi_query": False}, 32),
        ({"new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 8}, 8),
    ],
)
def test_falcon_says_its_kv_heads_by_flags(flags: dict[str, Any], kv_heads: int) -> None:
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert Fingerprint.from_config({**config, **flags}).num_kv_heads == kv_heads


def test_rope_of_old_and_new_configs_agrees() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    new = fingerprint(rope_parameters={**scaling, "rope_theta": 500000.0})
    old = fingerprint(rope_parameters=None, rope_theta=500000, rope_scaling=scaling)
    assert new.rope == old.rope
    assert new.rope["factor"] == 8.0
    assert isinstance(old.rope["rope_theta"], float)


def test_rope_names_its_type_under_either_key() -> None:
    old = fingerprint(
        rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0}
    )
    assert old.rope == {"factor": 2.0, "rope_theta": 1e4, "rope_type": "linear"}


def test_partial_rotary_counts_only_if_partial() -> None:
    full = fingerprint(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0})
    half = fingerprint(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    neox = fingerprint(rope_parameters=None, rotary_emb_base=10000, rotary_pct=0.5)
    assert full.rope == {"rope_theta": 1e4, "rope_type": "default"}
    assert half.rope == neox.rope == {**full.rope, "partial_rotary_factor": 0.5}


def test_rope_by_layer_type_stays_apart() -> None:
    rope = fingerprint(
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
        }
    ).rope
    assert rope["full_attention"] == {"rope_theta": 1e6, "rope_type": "default"}
    assert rope["sliding_attention"] == {"rope_theta": 1e4, "rope_type": "default"}


def test_without_rotary_embeddings() -> None:
    assert fingerprint(rope_parameters=None).rope == {"rope_type": "none"}


@pytest.mark.parametrize(
    ("config", "qk_norm"),
    [
        ({"model_type": "qwen3"}, True),
        ({"model_type": "cohere", "use_qk_norm": True}, True),
        ({"model_type": "phi", "qk_layernorm": False}, False),
        ({"model_type": "qwen2"}, False),
    ],
)
def test_qk_norm_by_flag_or_type(config: dict[str, Any], qk_norm: bool) -> None:
    assert fingerprint(**config).qk_norm is qk_norm


def test_layer_types_and_window() -> None:
    mixed = ["sliding_attention", "full_attention"] * 16
    found = fingerprint(layer_types=mixed, sliding_window=4096)
    assert found.layer_types == tuple(mixed)
    assert found.sliding_window == 4096
    assert fingerprint(layer_types=["full_attention"] * 32).layer_types is None
    assert fingerprint(layer_types=["attention"] * 32).layer_types is None
    assert fingerprint(sliding_window=4096, use_sliding_window=False).sliding_window is None
    assert fingerprint(sliding_window=0).sliding_window is None


def test_a_text_config_inside_is_found() -> None:
    assert Fingerprint.from_config({"model_type": "gemma3", "text_config": LLAMA}) == fingerprint()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": [8, 4]}, "num_key_value_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
    ],
)
def test_refuses_configs_without_the_numbers(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        fingerprint(**change)


def test_survives_json() -> None:
    found = fingerprint(layer_types=["sliding_attention", "full_attention"] * 16)
    assert Fingerprint.model_validate_json(found.model_dump_json()) == found


def test_same_model_needs_no_words() -> None:
    assert explain(fingerprint(), fingerprint()) == []
    assert check(record(), record()) == ()
    assert check(record(), fingerprint()) == ()


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"num_hidden_layers": 36}, "has 36 layers instead of 32"),
        ({"num_key_value_heads": 4}, "has 4 KV heads instead of 8"),
        ({"head_dim": 64}, "has head_dim 64 instead of 128"),
        ({"num_attention_heads": 16}, "has 16 query heads instead of 32"),
        ({"hidden_size": 2048}, "has hidden_size 2048 instead of 4096"),
        ({"model_type": "mistral"}, "is of type mistral instead of llama"),
        ({"use_qk_norm": True}, "normalises its keys"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "has RoPE rope_theta 10000.0 instead of 5"),
        ({"sliding_window": 512}, "a sliding window of 512 tokens instead of no sliding window"),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 16},
            "mixes full and other attention layers differently",
        ),
    ],
)
def test_each_difference_is_refused_and_named(change: dict[str, Any], phrase: str) -> None:
    with pytest.raises(FingerprintMismatchError) as caught:
        check(record(), record(id="Qwen/Qwen3-8B", **change))
    assert phrase in caught.value.message
    assert (
        "calibrated for meta-llama/Llama-3.1-8B (32 layers, 8 KV heads, head_dim 128), "
        "but Qwen/Qwen3-8B "
    ) in caught.value.message
    assert caught.value.hint == "kvq calibrate Qwen/Qwen3-8B -o ./Qwen3-8B-kvq"


def test_a_nameless_model_is_refused_too() -> None:
    with pytest.raises(FingerprintMismatchError, match="but the model has 36 layers"):
        check(record(), fingerprint(num_hidden_layers=36))


def test_many_differences_are_counted() -> None:
    other = record(
        num_hidden_layers=36,
        num_key_value_heads=4,
        head_dim=64,
        hidden_size=2048,
        model_type="qwen3",
    )
    with pytest.raises(FingerprintMismatchError, match="and differs in 2 more"):
        check(record(), other)


def test_another_commit_is_only_noted() -> None:
    (note,) = check(record(), record(revision="b" * 40))
    assert "commit aaaaaaaaaaaa" in note
    assert "commit bbbbbbbbbbbb" in note
    assert check(record(), record(revision=None)) == ()


def test_another_model_of_the_same_shape_is_only_noted() -> None:
    (note,) = check(record(), record(id="someone/fine-tune"))
    assert "meta-llama/Llama-3.1-8B" in note
    assert "someone/fine-tune" in note


def test_another_vocabulary_is_only_noted() -> None:
    (note,) = check(record(), record(vocab_size=128300))
    assert "128300" in note
