"""What ties a sidecar to a model: read from its configuration, compared before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict

from kvq_formats.errors import FingerprintMismatchError, UnsupportedModelError

if TYPE_CHECKING:
    from kvq_formats.records import BaseModelRecord

QK_NORM_MODEL_TYPES = frozenset(
    {
        "afmoe",
        "apertus",
        "dots1",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "gemma3",
        "gemma3_text",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "lfm2",
        "minimax_m2",
        "nanochat",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Model types that always normalise queries and keys; others say so by a flag, or do not."""

QK_NORM_FLAGS = ("use_qk_norm", "qk_layernorm", "qk_norm")

LAYER_TYPE_NAMES = {"attention": "full_attention", "mamba": "linear_attention"}
"""Older names of layer types, as configurations from before transformers 5 write them."""


class Fingerprint(BaseModel):
    """The facts about a model that its cache depends on.

    Fields:
        model_type: as transformers names it.
        num_hidden_layers, num_attention_heads, num_kv_heads, head_dim, hidden_size, vocab_size:
            of the text model.
        rope: ``{"rope_type": "none"}`` without rotary embeddings, else rope_type, rope_theta and
            whatever the type needs; a dict of such dicts where layer types rotate differently.
        qk_norm: keys are normalised before RoPE.
        layer_types: one name a layer; None if all attend fully or the configuration says nothing.
        sliding_window: in tokens; None without.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    rope: dict[str, Any]
    qk_norm: bool
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a text model's configuration, as transformers' ``config.to_dict()`` gives it.

        Raises UnsupportedModelError if it lacks a number that every attention model has, or gives
        one number a layer where kvq expects one for all.
        """
        if "num_hidden_layers" not in config and isinstance(config.get("text_config"), Mapping):
            config = config["text_config"]
        heads = _integer(config, "num_attention_heads", "n_head", "n_heads")
        hidden_size = _integer(config, "hidden_size", "n_embd", "d_model")
        layer_types = _layer_types(config)
        return cls(
            model_type=str(config.get("model_type") or "unknown"),
            num_hidden_layers=_integer(
                config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"
            ),
            num_attention_heads=heads,
            num_kv_heads=_num_kv_heads(config, heads),
            head_dim=_integer(config, "head_dim", default=hidden_size // heads),
            hidden_size=hidden_size,
            vocab_size=_integer(config, "vocab_size"),
            rope=_rope(config),
            qk_norm=_qk_norm(config),
            layer_types=layer_types,
            sliding_window=_sliding_window(config),
        )

    @property
    def summary(self) -> str:
        """The three numbers that people know a cache by."""
        return (
            f"{self.num_hidden_layers} layers, {self.num_kv_heads} KV heads, "
            f"head_dim {self.head_dim}"
        )


def explain(found: Fingerprint, expected: Fingerprint) -> list[str]:
    """What keeps a sidecar made for ``expected`` from serving ``found``, in words.

    Each entry continues a sentence about the found model, such as "has 36 layers instead of 32".
    Empty if the sidecar fits. The vocabulary may differ: the cache does not depend on it.
    """
    phrases = []
    for name, noun in (
        ("num_hidden_layers", "{} layers"),
        ("num_kv_heads", "{} KV heads"),
        ("head_dim", "head_dim {}"),
        ("num_attention_heads", "{} query heads"),
        ("hidden_size", "hidden_size {}"),
    ):
        is_, was = getattr(found, name), getattr(expected, name)
        if is_ != was:
            phrases.append(f"has {noun.format(is_)} instead of {was}")
    if found.model_type != expected.model_type:
        phrases.append(f"is of type {found.model_type} instead of {expected.model_type}")
    if found.qk_norm != expected.qk_norm:
        phrases.append("normalises its keys" if found.qk_norm else "does not normalise its keys")
    phrases += _explain_rope(found.rope, expected.rope)
    if found.sliding_window != expected.sliding_window:
        phrases.append(
            f"has {_window(found.sliding_window)} instead of {_window(expected.sliding_window)}"
        )
    if found.layer_types != expected.layer_types:
        phrases.append("mixes full and other attention layers differently")
    return phrases


def check(expected: BaseModelRecord, found: BaseModelRecord | Fingerprint) -> tuple[str, ...]:
    """Say whether a sidecar made for ``expected`` serves ``found``.

    ``found`` is a bare Fingerprint where the model has no name, as in ``attach``. Returns notes
    for the user (another commit, another model of the same shape), none if all agrees. Raises
    FingerprintMismatchError, which names the differences, if the cache has another shape.
    """
    if isinstance(found, Fingerprint):
        _refuse_differences(expected, found, name="the model", hint="kvq calibrate MODEL -o DIR")
        return ()
    _refuse_differences(
        expected,
        found.fingerprint,
        name=found.id,
        hint=f"kvq calibrate {found.id} -o ./{found.name}-kvq",
    )
    notes = []
    if expected.id != found.id:
        notes.append(
            f"this sidecar was calibrated for {expected.id}; {found.id} has the same shape, but "
            "its weights may differ."
        )
    elif expected.revision and found.revision and expected.revision != found.revision:
        notes.append(
            f"this sidecar was calibrated for commit {expected.revision[:12]} of {expected.id}, "
            f"but commit {found.revision[:12]} is used; --revision {expected.revision} gets the "
            "former."
        )
    if expected.fingerprint.vocab_size != found.fingerprint.vocab_size:
        notes.append(
            f"{found.id} has {found.fingerprint.vocab_size} vocabulary entries instead of "
            f"{expected.fingerprint.vocab_size}; the cache does not depend on them."
        )
    return tuple(notes)


def _refuse_differences(
    expected: BaseModelRecord, found: Fingerprint, *, name: str, hint: str
) -> None:
    phrases = explain(found, expected.fingerprint)
    if not phrases:
        return
    shown = phrases[:4]
    if len(shown) < len(phrases):
        shown.append(f"differs in {len(phrases) - len(shown)} more")
    sentence = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
    raise FingerprintMismatchError(
        f"this sidecar was calibrated for {expected.id} ({expected.fingerprint.summary}), "
        f"but {name} {sentence}.",
        hint=hint,
    )


def _window(tokens: int | None) -> str:
    return "no sliding window" if tokens is None else f"a sliding window of {tokens} tokens"


def _explain_rope(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    names = sorted({*found, *expected})
    differing = [name for name in names if found.get(name) != expected.get(name)]
    return [
        f"has RoPE {name} {found.get(name, 'unset')} instead of {expected.get(name, 'unset')}"
        for name in differing
    ]


def _integer(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise UnsupportedModelError(
                f"the model's configuration gives {name} as {value!r}; expected one number that "
                "holds for all layers."
            )
    if default is not None:
        return default
    raise UnsupportedModelError(
        f"the model's configuration ({config.get('model_type', 'no model_type')}) has no "
        f"{names[0]}; expected a decoder with attention layers."
    )


def _num_kv_heads(config: Mapping[str, Any], heads: int) -> int:
    # Falcon says it with flags; its num_kv_heads counts only in the newer architecture.
    if "multi_query" in config and "new_decoder_architecture" in config:
        if config["new_decoder_architecture"]:
            return _integer(config, "num_kv_heads", default=heads)
        return 1 if config["multi_query"] else heads
    return _integer(config, "num_key_value_heads", "num_kv_heads", default=heads)


def _qk_norm(config: Mapping[str, Any]) -> bool:
    for flag in QK_NORM_FLAGS:
        if isinstance(config.get(flag), bool):
            return bool(config[flag])
    return config.get("model_type") in QK_NORM_MODEL_TYPES


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = config.get("layer_types")
    if not names:
        return None
    types = tuple(LAYER_TYPE_NAMES.get(name, name) for name in names)
    return None if set(types) == {"full_attention"} else types


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    window = config.get("sliding_window")
    return int(window) if window else None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and parameters:
        nested = {
            name: _canonical_rope(value)
            for name, value in parameters.items()
            if isinstance(value, Mapping)
        }
        return nested or _canonical_rope(parameters)
    # Configurations from before transformers 5 spread the same facts over top-level keys.
    theta = config.get("rope_theta") or config.get("rotary_emb_base")
    if theta is None:
        return {"rope_type": "none"}
    partial = config.get("partial_rotary_factor") or config.get("rotary_pct")
    legacy = {"rope_theta": theta, "partial_rotary_factor": partial}
    return _canonical_rope({**legacy, **(config.get("rope_scaling") or {})})


def _canonical_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling: rope_type, numbers as float, nothing that is unset or does nothing."""
    canonical = {
        name: _canonical_number(value)
        for name, value in parameters.items()
        if value is not None and name != "type"
    }
    canonical["rope_type"] = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if canonical.get("partial_rotary_factor") == 1.0:
        del canonical["partial_rotary_factor"]
    return dict(sorted(canonical.items()))


def _canonical_number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_canonical_number(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
