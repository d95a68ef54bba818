"""Where a sidecar comes from: the model that was measured and the text it was measured on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from kvq_formats.fingerprint import Fingerprint, check

EMBEDDED_MODEL_ID = "kvq/tiny-llama"
"""The id of the model that is part of kvq. It looks like one of the Hub, but is not there."""


class BaseModelRecord(BaseModel):
    """The model that a sidecar belongs to.

    Fields:
        id: what a user types to get the model again: a Hub id, the absolute path of a local
            folder, or the embedded model's id.
        revision: commit sha on the Hub; None for a model that is not from there.
        fingerprint: what must agree before the sidecar may be used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    revision: str | None
    fingerprint: Fingerprint

    @property
    def name(self) -> str:
        """The last part of the id, fit for a folder's name."""
        return self.id.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "model"

    def check(self, found: BaseModelRecord) -> tuple[str, ...]:
        """Notes if a sidecar of this model serves ``found``; see ``fingerprint.check``."""
        return check(self, found)


class CalibrationRecord(BaseModel):
    """The text that a model was measured on.

    Fields:
        dataset: its name, as given.
        revision: commit sha of a Hub data set; ``sha256:`` and the hash of a bundled text; None for
            a local file.
        num_samples, seq_len: windows, and tokens a window.
        seed: that chose the windows.
        token_sha256: of the token ids, so that the same text can be recognised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    revision: str | None
    num_samples: int
    seq_len: int
    seed: int
    token_sha256: str
