"""What a quantized cache is made of: the options that decide its bytes and its codebooks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvq_formats.errors import ConfigError

PAGE_TOKENS = 256
"""Tokens of a page, at every width (see ``packing``)."""

LARGEST_CONTEXT = 2**31 - 1
"""Tokens of a row: positions are stored in int32."""

Bits = Literal[2, 3, 4]


class KVQConfig(BaseModel):
    """Options of a quantized cache, stored whole in the sidecar.

    Fields:
        key_bits, value_bits: width of a code.
        outlier_fraction: share of the entries that the thresholds leave outside, both tails
            together; keys by quantiles of each channel (offline), values by the largest and
            smallest entries of a token's vector (online). 0 keeps no outliers.
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_bits: Bits = 4
    value_bits: Bits = 4
    outlier_fraction: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    outlier_capacity: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    value_capacity_factor: Annotated[float, Field(ge=1, le=4)] = 1.25
    sink_tokens: Annotated[int, Field(ge=0, le=1024)] = 1
    recent_tokens: Annotated[int, Field(ge=0, le=65536)] = 0
    value_grain: Literal["token", "head"] = "token"
    qnorm: bool = True
    sensitivity: Literal["fisher", "none"] = "fisher"
    kmeans: Literal["exact", "sklearn"] = "exact"

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
