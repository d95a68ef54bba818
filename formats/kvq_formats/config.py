"""What a quantized cache is made of: the options that decide its bytes and its codebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvq_formats.errors import ConfigError

PAGE_TOKENS = 256
"""Tokens of a page, at every width (see ``packing``)."""

LARGEST_CONTEXT = 2**31 - 1
"""Tokens of a row: positions are stored in int32."""

Bits = Literal[2, 3, 4]


class KVQConfig(BaseModel):
    """Options of a quantized cache, stored whole in the sidecar.

    Fields:
        key_bits, value_bits: width of a code; with ``layer_bits`` the largest that a layer has.
        outlier_fraction: share of the entries that the thresholds leave outside, both tails
            together; keys by quantiles of each channel (offline), values by the largest and
            smallest entries of a token's vector (online). 0 keeps no outliers.
        range_margin: how many times wider the range of a key channel is than those quantiles.
            Text that is served is not the text that was calibrated on: beyond the range a key
            needs room in its page's pool.
        outlier_capacity: room of a key pool as a share of a page's entries. Beyond it the smallest
            residuals stay clamped.
        value_capacity_factor: room of a value list as a multiple of the expected number of value
            outliers of a page and head.
        sink_tokens: first attended tokens of a row, kept in the model's dtype.
        recent_tokens: newest tokens, kept in the model's dtype.
        value_grain: what shares one value scale and centre: a token's vector over all heads, or
            over one head.
        qnorm: fold Q-Norm into the decode codebooks.
        sensitivity: weight of a calibration point: squared gradient, or 1.
        kmeans: solver of the codebook fit.
        feedback: what rounding one channel loses is made good in others, by the second
            moments of the gradients (``feedback``); needs sensitivity and costs no bit.
        layer_bits: (key_bits, value_bits) by layer_idx, of every quantized layer; empty where all
            layers are alike. ``with_layer_bits`` sets it, ``for_layer`` reads it: who encodes,
            decodes or counts the pages of one layer asks for that layer's config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_bits: Bits = 4
    value_bits: Bits = 4
    outlier_fraction: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    range_margin: Annotated[float, Field(ge=1, le=2)] = 1.2
    outlier_capacity: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    value_capacity_factor: Annotated[float, Field(ge=1, le=4)] = 1.25
    sink_tokens: Annotated[int, Field(ge=0, le=1024)] = 1
    recent_tokens: Annotated[int, Field(ge=0, le=65536)] = 0
    value_grain: Literal["token", "head"] = "token"
    qnorm: bool = True
    sensitivity: Literal["fisher", "none"] = "fisher"
    kmeans: Literal["exact", "sklearn"] = "exact"
    feedback: bool = True
    layer_bits: dict[Annotated[int, Field(ge=0)], tuple[Bits, Bits]] = {}

    @model_validator(mode="before")
    @classmethod
    def _no_feedback_without_sensitivity(cls, options: Any) -> Any:
        """Feedback that nobody asked for is off where there are no gradients to find it by."""
        if isinstance(options, Mapping) and options.get("sensitivity") == "none":
            return {"feedback": False, **options}
        return options

    @field_validator("feedback")
    @classmethod
    def _feedback_has_gradients(cls, feedback: bool, info: ValidationInfo) -> bool:
        if feedback and info.data.get("sensitivity") == "none":
            raise PydanticCustomError(
                "feedback_without_sensitivity", "feedback needs sensitivity 'fisher'"
            )
        return feedback

    @field_validator("layer_bits")
    @classmethod
    def _in_order(
        cls, layer_bits: dict[int, tuple[Bits, Bits]], info: ValidationInfo
    ) -> dict[int, tuple[Bits, Bits]]:
        """Sorted by layer; refused where a width that is stated for all is not the largest."""
        for place, name in enumerate(("key_bits", "value_bits")):
            stated = info.data.get(name)
            largest = max((bits[place] for bits in layer_bits.values()), default=stated)
            # A width that is none has been refused by its own field.
            if stated is not None and stated != largest:
                raise PydanticCustomError(
                    "largest_bits",
                    "{name} is {stated}, but the largest of the layers is {largest}",
                    {"name": name, "stated": stated, "largest": largest},
                )
        return dict(sorted(layer_bits.items()))

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Layers that are alike leave the JSON as it was before there was ``layer_bits``."""
        fields: dict[str, Any] = handler(self)
        if not self.layer_bits:
            fields.pop("layer_bits", None)
        return fields

    def __hash__(self) -> int:
        options = {name: getattr(self, name) for name in type(self).model_fields}
        options["layer_bits"] = tuple(sorted(self.layer_bits.items()))
        return hash(tuple(options.values()))

    def for_layer(self, layer_idx: int) -> Self:
        """The config of one layer: its own widths, and no ``layer_bits``.

        Raises ConfigError where layers differ and this one is not among them.
        """
        if not self.layer_bits:
            return self
        if layer_idx not in self.layer_bits:
            named = ", ".join(map(str, self.layer_bits))
            raise ConfigError(
                f"layer_bits has no widths for layer {layer_idx}, only for {named}.",
                hint="layer_bits={layer_idx: (key_bits, value_bits)} of every quantized layer",
            )
        return self._with_widths(*self.layer_bits[layer_idx])

    def with_layer_bits(self, layer_bits: Mapping[int, tuple[int, int]]) -> Self:
        """The same options with (key_bits, value_bits) by layer_idx; empty: all layers alike.

        ``key_bits`` and ``value_bits`` become the largest. Raises ConfigError for other widths
        than 2, 3 and 4.
        """
        options = {**self.model_dump(), "layer_bits": dict(layer_bits)}
        if layer_bits:
            keys, values = zip(*layer_bits.values(), strict=True)
            options |= {"key_bits": max(keys), "value_bits": max(values)}
        return self.create(**options)

    def with_widths(self, bits: int) -> Self:
        """The same options with keys and values of all layers at one width, 2, 3 or 4."""
        return self.create(
            **{**self.model_dump(), "key_bits": bits, "value_bits": bits, "layer_bits": {}}
        )

    def layer_counts(self) -> dict[Self, int]:
        """How many layers have each config that ``for_layer`` gives; one where all are alike."""
        counts = Counter(self.layer_bits.values())
        return {self._with_widths(*bits): count for bits, count in counts.items()} or {self: 1}

    def bits_in_words(self) -> tuple[str, str]:
        """Widths of keys and of values: ``3 bits``, or ``2-4 bits (2.75 on average)``."""
        widths = self.layer_bits.values() or [(self.key_bits, self.value_bits)]
        keys, values = zip(*widths, strict=True)
        return widths_in_words(keys), widths_in_words(values)

    def _with_widths(self, key_bits: Bits, value_bits: Bits) -> Self:
        return self.model_copy(
            update={"key_bits": key_bits, "value_bits": value_bits, "layer_bits": {}}
        )

    @classmethod
    def create(cls, **options: Any) -> Self:
        """Build a config; raises ConfigError that names the option instead of a pydantic error."""
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            wanted = f"expected {bounds}" if (bounds := cls.bounds(name)) else first["msg"].lower()
            raise ConfigError(
                f"option {name} is {first['input']!r}: {wanted}.",
                hint="kvq calibrate --help lists the options and their ranges",
            ) from error

    @classmethod
    def bounds(cls, name: str) -> str | None:
        """The range of a number, as ``0 to 0.2``; None for what is no number or no option."""
        field = cls.model_fields.get(name)
        limits = field.metadata if field else []
        low = next((limit.ge for limit in limits if hasattr(limit, "ge")), None)
        high = next((limit.le for limit in limits if hasattr(limit, "le")), None)
        return None if low is None or high is None else f"{low:g} to {high:g}"


def widths_in_words(widths: Collection[int]) -> str:
    """One width of each layer: ``3 bits`` where they are equal, or their range and mean."""
    low, high = min(widths), max(widths)
    if low == high:
        return f"{low} bits"
    return f"{low}-{high} bits ({sum(widths) / len(widths):.4g} on average)"
