"""What one check says, and what the user asked about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kvq_formats.config import KVQConfig
    from kvq_formats.errors import KVQError

Status = Literal["pass", "note", "fail"]


@dataclass(frozen=True)
class Check:
    """A row of the result.

    Fields:
        name: what was looked at, in a word or two.
        status: ``pass``; ``note`` for what is good to know or could not be looked at; ``fail`` for
            what would make another command fail.
        message: what was found.
        hint: the command or flag that mends it.
    """

    name: str
    status: Status
    message: str
    hint: str | None = None

    @classmethod
    def failure(cls, name: str, error: KVQError) -> Check:
        """What another command would fail with."""
        return cls(name, "fail", error.message, error.hint)

    def row(self) -> tuple[str, str, str]:
        """For people."""
        hint = f"\nHint: {self.hint}" if self.hint else ""
        return self.name, self.status, self.message + hint

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What the command line said.

    Fields:
        model: folder or Hub id; None for the built-in model.
        revision, trust_remote_code: as for ``resolve_model``.
        config: the cache that is thought of.
        dtype, device_map: as for ``load_model``.
        context: tokens that it shall have room for; None where nothing was said.
    """

    model: str | None
    revision: str | None
    trust_remote_code: bool
    config: KVQConfig
    dtype: str = "auto"
    device_map: str | None = None
    context: int | None = None
