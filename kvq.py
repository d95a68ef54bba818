"""The public Python API of kvq, on one page. A name is loaded when it is first used.

import kvq

sidecar = kvq.calibrate("Qwen/Qwen3-0.6B", bits=3)              # kvq calibrate
sidecar.save("./q")
kvq.evaluate(model, ["./q"], tokens=tokens)                     # kvq eval
print(kvq.plan_memory(model, "./q", context=131072).total)      # kvq generate's plan
with kvq.attach(model, "./q"): model.generate(**inputs)         # kvq generate
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq_calibration.plan import calibrate_from_text as calibrate
    from kvq_evaluation.retrieval import evaluate_retrieval as evaluate_retrieval
    from kvq_evaluation.sidecars import evaluate_on_tokens as evaluate
    from kvq_formats.config import KVQConfig as KVQConfig
    from kvq_formats.errors import KVQError as KVQError
    from kvq_formats.sidecar import Sidecar as Sidecar
    from kvq_runtime.attach import attach as attach
    from kvq_runtime.cache import PackedCache as PackedCache
    from kvq_runtime.captured_decode import CapturedDecode as CapturedDecode
    from kvq_runtime.embedded import embedded_model_path as embedded_model_path
    from kvq_runtime.memory import MemoryPlan as MemoryPlan
    from kvq_runtime.memory import plan_memory as plan_memory
    from kvq_runtime.sidecars import open_sidecar as load_sidecar

    __version__: str

_HOMES = {
    "CapturedDecode": ("kvq_runtime.captured_decode", "CapturedDecode"),
    "KVQConfig": ("kvq_formats.config", "KVQConfig"),
    "KVQError": ("kvq_formats.errors", "KVQError"),
    "MemoryPlan": ("kvq_runtime.memory", "MemoryPlan"),
    "PackedCache": ("kvq_runtime.cache", "PackedCache"),
    "Sidecar": ("kvq_formats.sidecar", "Sidecar"),
    "attach": ("kvq_runtime.attach", "attach"),
    "calibrate": ("kvq_calibration.plan", "calibrate_from_text"),
    "embedded_model_path": ("kvq_runtime.embedded", "embedded_model_path"),
    "evaluate": ("kvq_evaluation.sidecars", "evaluate_on_tokens"),
    "evaluate_retrieval": ("kvq_evaluation.retrieval", "evaluate_retrieval"),
    "load_sidecar": ("kvq_runtime.sidecars", "open_sidecar"),
    "plan_memory": ("kvq_runtime.memory", "plan_memory"),
}

__all__ = [
    "CapturedDecode",
    "KVQConfig",
    "KVQError",
    "MemoryPlan",
    "PackedCache",
    "Sidecar",
    "__version__",
    "attach",
    "calibrate",
    "embedded_model_path",
    "evaluate",
    "evaluate_retrieval",
    "load_sidecar",
    "plan_memory",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("kvq")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvq' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
