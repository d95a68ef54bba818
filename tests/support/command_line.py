"""What a command of kvq printed when a test ran it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ran:
    """Exit code, stdout and stderr."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON object that it should be."""
        return json.loads(self.stdout)


Kvq = Callable[..., Ran]
