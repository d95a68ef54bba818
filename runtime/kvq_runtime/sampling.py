"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvq_formats.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """Sampling options; what a model's own generation_config.json says of them is not used.

    Fields:
        temperature: of the softmax; 0 takes the likeliest token (greedy).
        top_p: smallest set of tokens whose probabilities reach this sum; None for all.
        top_k: so many likeliest tokens; None for all.
        repetition_penalty: divides the scores of tokens that occurred already; None for none.
        seed: of the random numbers.

    Raises ConfigError for numbers that make no sense, and for ``top_p`` or ``top_k`` without a
    temperature, where they would change nothing.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            _refuse("temperature", self.temperature, "a number of at least 0", "0.7, or 0: greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "a number above 0 and up to 1", "0.95")
        if self.top_k is not None and self.top_k < 1:
            _refuse("top_k", self.top_k, "at least 1", "50, or leave it out for all tokens")
        penalty = self.repetition_penalty
        if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
            _refuse("repetition_penalty", penalty, "a number above 0", "1.1")
        if not 0 <= self.seed <= LARGEST_SEED:
            _refuse("seed", self.seed, "0 to 2**63 - 1", "0")
        if self.is_greedy and (self.top_p is not None or self.top_k is not None):
            name = "top_k" if self.top_p is None else "top_p"
            raise ConfigError(
                f"{name} has no effect at temperature 0, which takes the likeliest token.",
                hint=f"--temperature 0.7, or leave {_flag(name)} out",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, so that the seed does not matter."""
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def options(self) -> dict[str, Any]:
        """The same for ``GenerationConfig``: all given, so that none comes from the model."""
        # transformers' own default, which it takes without a word where nothing is sampled.
        every = 50 if self.is_greedy else 0
        return {
            "do_sample": not self.is_greedy,
            "temperature": 1.0 if self.is_greedy else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or every,
            "repetition_penalty": self.repetition_penalty or 1.0,
        }


@contextmanager
def seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the model's devices; their states are back on exit."""
    import torch

    from kvq_runtime.offload import execution_devices

    devices = {device for device in execution_devices(model) if device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        torch.manual_seed(seed)
        yield


def _refuse(name: str, found: float, expected: str, example: str) -> None:
    raise ConfigError(f"{name} is {found:g}, expected {expected}.", hint=f"{_flag(name)} {example}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
