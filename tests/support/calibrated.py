"""Tiny models calibrated on random tokens, and how far they are from themselves afterwards."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_calibration.pipeline import calibrate
from kvq_formats.config import KVQConfig
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.records import BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar
from kvq_runtime.supported_models import text_config


def calibrated(model: PreTrainedModel) -> Sidecar:
    """At 4 bits, on random tokens."""
    ids = torch.randint(3, 199, (2, 256), generator=torch.Generator().manual_seed(5))
    fingerprint = Fingerprint.from_config(text_config(model.config))
    return calibrate(
        model,
        ids,
        KVQConfig.create(key_bits=4, value_bits=4),
        base_model=BaseModelRecord(id="test/tiny", revision=None, fingerprint=fingerprint),
        calibration=CalibrationRecord(
            dataset="test", revision=None, num_samples=2, seq_len=256, seed=5, token_sha256="0" * 64
        ),
    )


def divergence(p: Tensor, q: Tensor, mask: Tensor) -> float:
    """Mean KL of the attended tokens' distributions, nats."""
    p, q = (logits[mask.bool()].double().log_softmax(-1) for logits in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())
