"""Baselines by name, as ``kvq eval --baseline`` takes them: ``kivi2``, ``kivi2-g64``, ``fp8``.

A name is a method, its bits where it has a choice, and a group size where it has one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvq_formats.errors import ConfigError
from kvq_runtime.evaluation_rule import CacheCodec

if TYPE_CHECKING:
    from kvq_evaluation.samples import LayerSamples

    Samples = Mapping[int, LayerSamples]


class Baseline(CacheCodec, Protocol):
    """A codec that knows what it costs."""

    def effective_bits(
        self, num_kv_heads: int, head_dim: int, *, tokens: int | None = None
    ) -> float:
        """Bits a cached number at ``tokens`` tokens, everything counted."""
        ...


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods.

    Fields:
        summary: what it is, in a few words.
        make: builds it from options, ``layers`` or ``samples`` among them.
        widths: bits that it may have; empty where it has no choice.
        groups: whether it takes a group size.
        calibrated: whether it is handed samples instead of layers.
    """

    summary: str
    make: Callable[..., Baseline]
    widths: tuple[int, ...] = (2, 3, 4)
    groups: bool = False
    calibrated: bool = False


@dataclass(frozen=True)
class BaselineName:
    """A name taken apart.

    Fields:
        name: as given.
        method: the entry of the table.
        options: bits and group, where they are named.
    """

    name: str
    method: Method
    options: Mapping[str, int]

    @classmethod
    def parse(cls, name: str) -> BaselineName:
        """Raises ConfigError for a method that is not known, or bits or a group it cannot have."""
        methods = _methods()
        stem, _, group = name.partition("-g")
        method_name, bits = (stem, "") if stem in methods else (stem[:-1], stem[-1:])
        if method_name not in methods or (group and not group.isdecimal()):
            raise ConfigError(_unknown(name, methods), hint="kvq eval --baseline kivi2,hadamard4")
        method = methods[method_name]
        options: dict[str, int] = {}
        if method.widths:
            if not bits.isdecimal() or int(bits) not in method.widths:
                widths = ", ".join(f"{method_name}{width}" for width in method.widths)
                raise ConfigError(
                    f"baseline {name!r} names no width that it can have, expected {widths}.",
                    hint=f"--baseline {method_name}{method.widths[-1]}",
                )
            options["bits"] = int(bits)
        if group:
            if not method.groups or int(group) < 1:
                raise ConfigError(
                    f"baseline {name!r} names a group, which {method_name} does not take.",
                    hint=f"--baseline {stem}",
                )
            options["group"] = int(group)
        return cls(name, method, options)

    def make(
        self,
        *,
        layers: Collection[int],
        samples: Callable[[], Samples],
        sink_tokens: int,
        recent_tokens: int = 0,
    ) -> Baseline:
        """Build it; ``samples`` is called only by methods that are calibrated."""
        given: dict[str, Any] = {
            **self.options,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
        }
        if self.method.calibrated:
            return self.method.make(samples(), **given)
        return self.method.make(layers=layers, **given)


def method_summaries() -> dict[str, str]:
    """What each method is, by the name that it has here, for help and errors."""
    return {name: method.summary for name, method in _methods().items()}


def _unknown(name: str, methods: Mapping[str, Method]) -> str:
    near = difflib.get_close_matches(name.rstrip("0123456789"), methods, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"there is no baseline {name!r}; there are {', '.join(methods)}.{meant}"


def _methods() -> dict[str, Method]:
    # Imported when asked for: help must not load torch.
    from functools import partial

    from kvq_evaluation.baselines.fp8 import Fp8
    from kvq_evaluation.baselines.gear import Gear
    from kvq_evaluation.baselines.hadamard_int import HadamardInt
    from kvq_evaluation.baselines.int_per_token import IntPerToken
    from kvq_evaluation.baselines.int_per_token_head import IntPerTokenHead
    from kvq_evaluation.baselines.kivi import Kivi
    from kvq_evaluation.baselines.kvquant import KVQuant
    from kvq_evaluation.baselines.mikv import MiKV
    from kvq_evaluation.baselines.normal_float import NormalFloat
    from kvq_evaluation.baselines.nvfp4 import Nvfp4
    from kvq_evaluation.baselines.oscar import Oscar
    from kvq_evaluation.baselines.qserve import QServe
    from kvq_evaluation.baselines.rotate_kv import RotateKV
    from kvq_evaluation.baselines.turboquant import TurboQuant
    from kvq_evaluation.baselines.vid_kv import VidKV
    from kvq_evaluation.baselines.zipcache import ZipCache

    return {
        "int": Method("integers, a scale a token and head", IntPerTokenHead, groups=True),
        "int-token": Method("integers, a scale a token", IntPerToken),
        "nf": Method("NormalFloat in blocks", NormalFloat, groups=True),
        "kivi": Method("keys a channel, values a token, in groups", Kivi, groups=True),
        "kvquant": Method("KVQuant as its code does it", KVQuant.calibrated, calibrated=True),
        "kvquant-paper": Method(
            "the same, its bits as the paper counts them",
            partial(KVQuant.calibrated, storage="paper"),
            calibrated=True,
        ),
        "hadamard": Method("Hadamard rotation and integers, a scale a token and head", HadamardInt),
        "turboquant": Method("random rotation, Gaussian codebook, norm", TurboQuant),
        "turboquant-nc": Method(
            "the same with vLLM's norm correction", partial(TurboQuant, norm_correction=True)
        ),
        "fp8": Method("e4m3, a scale a tensor", Fp8.calibrated, widths=(), calibrated=True),
        "nvfp4": Method("e2m1 in blocks of 16", Nvfp4.calibrated, widths=(), calibrated=True),
        "oscar": Method(
            "calibrated rotation, clipping", Oscar.calibrated, groups=True, calibrated=True
        ),
        "oscar-head": Method(
            "the same, a rotation a head",
            partial(Oscar.calibrated, per_head=True),
            groups=True,
            calibrated=True,
        ),
        "qserve": Method("SmoothAttention and integers", QServe.calibrated, calibrated=True),
        "rotatekv": Method(
            "reordered channels, grouped Hadamard before RoPE",
            RotateKV.calibrated,
            groups=True,
            calibrated=True,
        ),
        "gear": Method("groups, low rank and outliers", Gear, groups=True),
        "zipcache": Method("4 and 2 bits by saliency", ZipCache, widths=()),
        "mikv": Method("4 and 2 bits by accumulated attention", MiKV, widths=()),
        "vidkv": Method("1.5-bit keys, ternary values", VidKV, widths=()),
    }
