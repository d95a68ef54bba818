"""Peak memory of a calibration, counted before any weights are loaded.

Two passes over the text, each with a few moments that can be the worst (``first_pass`` and
``second_pass`` say which), and then the fitting, layer by layer (``third_pass``). Symbols as in
``layer_bytes``, ``N`` tokens a batch, ``L`` layers, ``V`` vocabulary, ``s`` bytes of the model's
type. Far gradients are those through queries of later pages (``far_gradients``); there are some
where windows are longer than their sinks and a page.

Counted are tensors, those that are always on the CPU (``histograms``, ``fitting``) as if they were
on the device. Left out is what a machine needs beside them: a CUDA context and the workspaces
of its libraries (0.5 to 1 GiB), what an allocator loses between blocks, a copy of one weight in 16
bits while bitsandbytes computes with it or accelerate brings it to its device, the tokenised text,
and a few MiB that are of one size for any model, for k-means and steps of outliers.
Where weights are spread (``auto``) all free memory is added up, and no device is looked at alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvq_calibration.bins import CHUNK, NUM_BINS
from kvq_calibration.far_gradients import has_far_queries
from kvq_calibration.layer_bytes import POSITIONS, LayerShape, scores_are_written
from kvq_calibration.refit import CODEBOOK_TOKENS, MEAN_TOKENS
from kvq_calibration.residuals import BINS
from kvq_calibration.thresholds import ChannelQuantiles
from kvq_calibration.token_loss import rows_a_chunk
from kvq_calibration.token_sample import stride_of
from kvq_formats.config import PAGE_TOKENS, KVQConfig
from kvq_runtime.available_memory import available_bytes
from kvq_runtime.models import target_device
from kvq_runtime.supported_models import quantized_layers, text_config
from kvq_runtime.weight_bytes import weight_bytes, weights_dtype, without_weights

if TYPE_CHECKING:
    from kvq_runtime.resolve import ResolvedModel

HISTOGRAM = 8 * (2 * 3 * NUM_BINS + 2 * 2 * BINS)
"""Bytes of the f64 bins of keys, or of values, of one layer."""


@dataclass(frozen=True)
class CalibrationMemory:
    """Bytes of a calibration, and what there is to hold them.

    Fields:
        seq_len, batch_size: tokens a window, windows a step.
        sensitivity: ``fisher`` or ``none``.
        device: where the model will be, or how it is spread.
        weights: parameters and buffers.
        keys, keys_and_values: of a batch, all quantized layers, as the first and the second pass
            keep them.
        gradients: of keys and values, and far ones, while a batch goes back; 0 without
            sensitivity.
        checkpoints: the input of every layer, kept for recomputing it; 0 without sensitivity.
        forward: one layer's forward.
        recomputation: one layer's forward and backward, and its attention once more for far
            gradients; 0 without sensitivity.
        logits: logits, their gradient and a chunk of rows in fp32, and the mask that layers keep
            for recomputing them; 0 without sensitivity.
        measuring: one layer's keys and values in fp32 with their weights, on the way into
            histograms.
        quantiles: tails of every key channel, first pass.
        sorting: one layer's keys in fp32 as they join the tails.
        histograms: of all layers, second pass, and with sensitivity the moments of gradients and
            the tokens that are kept as they are.
        fitting: of one layer, codebooks and shifts of numbers with feedback; 0 without.
        available: memory that is free on the device.
    """

    seq_len: int
    batch_size: int
    sensitivity: str
    device: str
    weights: int
    keys: int
    keys_and_values: int
    gradients: int
    checkpoints: int
    forward: int
    recomputation: int
    logits: int
    measuring: int
    quantiles: int
    sorting: int
    histograms: int
    fitting: int
    available: int
    num_layers: int

    @property
    def first_pass(self) -> int:
        """Keys and tails, and a layer's forward or the sorting of its keys."""
        return self.keys + self.quantiles + max(self.forward, self.sorting)

    @property
    def second_pass(self) -> int:
        """Keys, values and histograms, and the worst of three moments.

        With sensitivity: all checkpoints and the logits at the end of the forward; a layer's
        recomputation, the last one with all checkpoints or the first one with all gradients (each
        layer that goes back frees a checkpoint and adds gradients); all gradients and the measuring
        of a layer. Without: a layer's forward or its measuring.
        """
        held = self.keys_and_values + self.histograms
        if self.sensitivity == "none":
            return held + max(self.forward, self.measuring)
        one = self.gradients // max(self.num_layers, 1)
        back = max(self.checkpoints + one, self.gradients) + self.recomputation
        ends = (self.checkpoints + max(self.forward, self.logits), self.gradients + self.measuring)
        return held + max(back, *ends)

    @property
    def third_pass(self) -> int:
        """Histograms, and the fitting of one layer; the text is not looked at any more."""
        return self.histograms + self.fitting

    @property
    def activations(self) -> int:
        """All but weights, at the worst moment of all passes."""
        return max(self.first_pass, self.second_pass, self.third_pass)

    @property
    def total(self) -> int:
        """Weights and activations."""
        return self.weights + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has room for all of it."""
        return self.total <= self.available

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes where nothing else is said."""
        names = (
            "weights", "keys", "keys_and_values", "gradients", "checkpoints", "forward",
            "recomputation", "logits", "measuring", "quantiles", "sorting", "histograms",
            "fitting", "first_pass", "second_pass", "third_pass", "activations", "total",
            "available",
        )  # fmt: skip
        return {
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "sensitivity": self.sensitivity,
            "device": self.device,
            **{f"{name}_bytes": getattr(self, name) for name in names},
            "fits": self.fits,
        }


def plan_calibration_memory(
    model: ResolvedModel,
    config: KVQConfig,
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int = 1,
    dtype: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    load_in: str | None = None,
) -> CalibrationMemory:
    """Count what a calibration would need, loading no weights.

    Args:
        model: what ``resolve_model`` found.
        config: sensitivity, outliers and sinks of it matter.
        num_samples, seq_len, batch_size: windows, tokens a window, windows a step.
        dtype, device_map, attn_implementation, load_in: as for ``load_model``.

    Raises ConfigError for an option that makes no sense.
    """
    place = target_device(device_map)
    kind = weights_dtype(model, dtype)
    shapes = without_weights(model, kind)
    activations = count_activations(
        shapes,
        config,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        attn_implementation=attn_implementation,
    )
    return CalibrationMemory(
        seq_len=seq_len,
        batch_size=batch_size,
        sensitivity=config.sensitivity,
        device=place,
        weights=weight_bytes(model, dtype=kind, load_in=load_in),
        available=available_bytes(place),
        **activations,
    )


def count_activations(
    model: PreTrainedModel,
    config: KVQConfig,
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int,
    attn_implementation: str | None = None,
) -> dict[str, int]:
    """The fields of ``CalibrationMemory`` that are no weights, of a model that may be on ``meta``.

    - ``keys``, ``keys_and_values``: ``N * s`` times channels of a layer; where one projection makes
      queries, too, they keep all of its output. The first pass still has one layer's keys of the
      last batch, in fp32.
    - ``gradients``: ``2 C N s`` a layer, and as much for far ones. A key of which a part is rotated
      is kept, and has its gradient, in two pieces.
    - ``checkpoints``: ``h N s`` a layer, and the embeddings and their gradient.
    - ``logits``: ``V N s`` twice, three times with a soft-cap, whose tanh is kept; four fp32 copies
      of a chunk of rows; the last hidden state, in fp32 for its norm, and its gradient.
    - ``measuring``: fp32 keys, values, normalised, clamped, masked, counted, and their flags: 40
      bytes a number; with sensitivity 24 more for squared gradients and weights, and 8 for far
      gradients. Histograms take chunks in f64, moments a batch in f32 and f64.
    - ``quantiles``, ``sorting``: two tails of ``held`` f32 numbers a channel; keys in the model's
      type and in f32 with what tells whether they are finite, then joined with a tail, and its
      values and i64 indices.
    - ``histograms``: two moments f64 ``[H, D, D]`` a layer, four with far gradients; of a token in
      the samples C numbers of the model's type and H in f32.
    - ``fitting``: the pages of values for their shifts, when the codebook has been fitted. Of every
      token in the sample, f32: it, twice, and decoded; of those that the codebook was fitted to,
      f32 numbers, targets, weights and ranges, and flags. Of every token in whole pages, f32:
      it, as a vector over heads, normalised, its residual and its steps; code and two flags; an
      outlier's 2 bytes and its place, i64, twice, with a flag.
    """
    shape, s = LayerShape.of(model), model.dtype.itemsize
    given = text_config(model.config)
    layers, every = len(quantized_layers(model.config)), int(given["num_hidden_layers"])
    windows = min(batch_size, num_samples)
    N, h, C, V = windows * seq_len, shape.hidden, shape.channels, int(given["vocab_size"])
    fisher = config.sensitivity == "fisher"
    far = fisher and has_far_queries(seq_len, sink_tokens=config.sink_tokens)
    implementation = attn_implementation or model.config._attn_implementation
    eager = scores_are_written(implementation)
    # What is masked beyond causality has a mask: in the model's type for scores, else of bools.
    has_mask = eager or layers < every
    kinds = 1 if layers == every else 2
    mask = kinds * windows * seq_len**2 * (s if eager else 1) if has_mask else 0
    moment: dict[str, Any] = {"tokens": N, "seq_len": seq_len, "eager": eager}
    total = num_samples * max(seq_len - config.sink_tokens, 1)
    tails = ChannelQuantiles(config.outlier_fraction, total_tokens=total)
    held = min(tails.held, -(-total // tails.stride))
    softcap = bool(given.get("final_logit_softcapping"))
    chunk = 4 * 4 * min(N, rows_a_chunk(V)) * V
    logits = N * (s * V * (3 if softcap else 2) + (2 * s + 4) * h + 2 * POSITIONS) + chunk
    moments = 8 * C * shape.head_dim if fisher else 0
    # The samples of keys and of values; those of values are the larger ones.
    in_sample = {most: _sampled(total, most) for most in (CODEBOOK_TOKENS, MEAN_TOKENS)}
    samples = (s * C + 4 * C // shape.head_dim) * sum(in_sample.values()) if fisher else 0
    in_all = in_sample[MEAN_TOKENS]
    paged = -(-in_all // PAGE_TOKENS) * PAGE_TOKENS
    copies = C * (12 * in_all + 17 * _sampled(in_all, CODEBOOK_TOKENS) + 42 * paged)
    measured = 72 if far else 64 if fisher else 40
    only_keys = C if shape.kept == 2 * C else shape.kept
    return {
        "num_layers": layers,
        "keys": layers * N * s * (only_keys + shape.cut) + 4 * N * C,
        "keys_and_values": layers * N * s * (shape.kept + shape.cut),
        "gradients": layers * N * s * ((4 if far else 2) * C + shape.cut) if fisher else 0,
        "checkpoints": N * s * h * (every + 2) if fisher else 0,
        "forward": mask + shape.forward_bytes(s, **moment),
        "recomputation": mask + shape.backward_bytes(s, **moment, far=far) if fisher else 0,
        "logits": mask + logits if fisher else 0,
        "measuring": N * C * measured + 4 * 8 * min(N * C, CHUNK) + 2 * moments,
        "quantiles": layers * 2 * 4 * C * held,
        "sorting": N * C * (s + 10) + 4 * C * (held + -(-N // tails.stride)) + 12 * C * held,
        "histograms": layers * (2 * HISTOGRAM + (4 if far else 2) * moments + samples),
        "fitting": copies + 4 * moments if fisher and config.feedback else 0,
    }


def _sampled(tokens: int, at_most: int) -> int:
    """Tokens that a ``TokenSample`` keeps of so many."""
    return -(-tokens // stride_of(tokens, at_most=at_most))
