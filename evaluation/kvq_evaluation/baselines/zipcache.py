"""ZipCache: tokens that are attended to more than others keep 4 bits, the others 2.

He et al., NeurIPS 2024, arXiv 2405.14256; code: ThisisBillhe/ZipCache, ``zipcache/models``.

- Saliency of a token, a key/value head at a time: the attention that probes pay to it, over the
  number of probes that may attend to it. Probes are the last 5 % of the tokens and as many random
  ones before them, drawn with a seed here. The paper's normalization is used; the code divides by
  the number of all later tokens, probes or not, which favours recent tokens.
- Of each head's tokens 60 % are salient (their demo). Keys are quantized a channel over all tokens
  of a class; values channel-separably a token: each channel is divided by ``sqrt(max|X_i|)``, then a
  row of all heads has a scale and zero. A row holds each head's n-th token of the class, as there.

Saliency is taken over the whole text, later queries included, and so are the ranges of channels:
both favour this method. The harness hands over the tokens after the sinks, so attention paid to
sinks is not seen. Their buffer of up to 100 new tokens in fp16 is ``recent_tokens``. Membership is
counted as a bit a token and head, for keys and values together; their code stores int64 indices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kvq_evaluation.baselines import uniform
from kvq_evaluation.baselines.attention_mass import (
    attention_mass,
    by_class,
    check_split,
    most,
    queries_missing,
)
