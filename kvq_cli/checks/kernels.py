"""Which implementation of attention would run here, and whether kernels take the model's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvq_cli.checks.check import Asked, Check
from kvq_formats.errors import KVQError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvq_formats.sidecar import Sidecar
    from kvq_runtime.implementation import Implementation


def check_implementation(asked: Asked) -> tuple[Check, Implementation | None]:
    """What would run, and why."""
    from kvq_runtime.implementation import choose_implementation
    from kvq_runtime.models import first_device, target_device

    try:
        chosen = choose_implementation(first_device(target_device(asked.device_map)))
    except KVQError as error:
        if error.exit_code == 2:
            raise
        return Check.failure("implementation", error), None
    return Check("implementation", "pass", f"{chosen.name}: {chosen.reason}"), chosen


def check_kernel_shape(sidecar: Sidecar, miniature: PreTrainedModel, *, needed: bool) -> Check:
    """Triton kernels take the model's head_dim, query heads and rotated channels.

    Args:
        sidecar: of the model's shape.
        miniature: of the model; it rotates alike.
        needed: whether kernels would run here; if not, what they do not take is only noted.
    """
    import torch

    from kvq_runtime.implementation import choose_implementation
    from kvq_runtime.page_codec import check_kernels, page_codecs

    name, shape = "kernel shape", sidecar.base_model.fingerprint
    try:
        # Where the model would be is another question: asked here is whether Triton is installed.
        choose_implementation(torch.device("cuda"), "triton")
        check_kernels(page_codecs(miniature, sidecar), shape)
    except KVQError as error:
        if needed:
            return Check.failure(name, error)
        return Check(name, "note", f"on a GPU: {error.message}", error.hint)
    group = shape.num_attention_heads // shape.num_kv_heads
    heads = "head" if group == 1 else "heads"
    return Check(
        name,
        "pass",
        f"Triton kernels take head_dim {shape.head_dim} and {group} query {heads} a KV head",
    )
