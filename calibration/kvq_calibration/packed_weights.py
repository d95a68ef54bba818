"""4-bit weights of bitsandbytes on the CPU: kept in the layout that has gradients.

On CPUs with AVX512-BF16 a ``Linear4bit`` in evaluation mode rearranges its weights for good at its
first forward without gradients, and what is rearranged has no backward. In training mode it leaves
them alone and computes the same; nothing else of it depends on the mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from kvq_formats.errors import CalibrationError

PACKS = "support_avx512bf16_for_cpu"
"""Attribute of modules that may rearrange their weights."""
PACKED = "packing_format_for_cpu"
"""Attribute of a weight's state: whether that has happened."""


@contextmanager
def weights_as_loaded(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit weights as they are while the context is open; modes are back on exit."""
    linears = [module for module in model.modules() if hasattr(module, PACKS)]
    modes = [module.training for module in linears]
    for module in linears:
        module.training = True
    try:
        yield
    finally:
        for module, training in zip(linears, modes, strict=True):
            module.training = training


def check_differentiable(model: nn.Module) -> None:
    """Raise CalibrationError for a model whose weights were rearranged before."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, PACKED, False):
            raise CalibrationError(
                "bitsandbytes has rearranged the 4-bit weights for inference on the CPU, as it "
                "does in a model's first forward; gradients do not pass through them any more.",
                hint="load the model again and calibrate before anything else, or "
                "--sensitivity none",
            )
