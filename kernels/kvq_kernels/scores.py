"""Scores in units of ``exp2``, as kernels take them, and soft caps."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl

from kvq_kernels.attention import AttentionOptions

LOG2_E: Final = tl.constexpr(1.4426950408889634)


def score_arguments(options: AttentionOptions) -> dict[str, Any]:
    """What kernels are given to make scores of products."""
    capped = options.softcap is not None
    return {
        # A soft cap comes between the scores and the units of exp2.
        "score_scale": options.scaling * (1.0 if capped else LOG2_E.value),
        "softcap": options.softcap if capped else 1.0,
        "SOFTCAP": capped,
    }


@triton.jit
def soft_capped(scores, softcap):
    """``softcap * tanh(scores / softcap)``, in units of ``exp2``."""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both infinities.
    exponential = tl.exp2(scores / softcap * (2.0 * LOG2_E))
    return (1.0 - 2.0 / (exponential + 1.0)) * (softcap * LOG2_E)
