"""The runtime rule: an attached model stores packed pages and attends straight over them.

Keys reach the cache before RoPE; what ``update`` hands on to attention are ``PackedStates``, which
only the attention here can read. How the tokens of a text are fed, whole, in chunks or one by one,
makes no difference to what a query sees (``docs/method.md``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function
from transformers.utils import ModelOutput

from kvq_formats.errors import KVQError, UnsupportedModelError
from kvq_kernels.attention import AttentionOptions
from kvq_kernels.rotary import rotate
from kvq_runtime.cache import adopt, packed_layers
from kvq_runtime.decode_step import StepForward
from kvq_runtime.forward import Forward, Rule, check_positions, spans
from kvq_runtime.implementation import ImplementationName
from kvq_runtime.layer import PackedLayer, PackedStates
from kvq_runtime.page_codec import PageCodec
from kvq_runtime.rope import (
    AttentionCall,
    AttentionTap,
    MaskFunction,
    RotaryCall,
    rotary_modules,
    tap_attention,
)
from kvq_runtime.rotary_channels import UNROTATED, splice
from kvq_runtime.rows import attended_mask

HONOURED_OPTIONS = frozenset({"scaling", "softcap", "s_aux", "sliding_window", "dropout"})
"""Attention options that change what is computed, and that are honoured or checked."""

HARMLESS_OPTIONS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "logits_to_keep",
        "position_embeddings",
        "is_first_iteration",
    }
)
"""Options that models pass through and that attention has no use for."""


class RuntimeTap(AttentionTap):
    """Puts a packed cache under every forward."""

    def __init__(
        self,
        model: PreTrainedModel,
        codecs: Mapping[int, PageCodec],
        *,
        rule: Rule,
        impl: ImplementationName,
    ) -> None:
        self.model = model
        self.codecs = codecs
        self.rule = rule
        self.impl = impl
        self.cache: Callable[[], Cache | None] = lambda: None
        self.forward: Forward | None = None
        self.attended: Tensor | None = None
        self.shape = (0, 0)
        self.stock_prefill = False
        self.keeps_cache = True
        self.all_packed = False

    def close(self) -> None:
        """Caches that are kept beyond the attachment say so when they are used."""
        if self.forward is not None:
            self.forward.active = False

    def on_forward(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put a packed cache in place and learn which tokens are attended."""
        if arguments.get("output_attentions") or _config_wants_attentions(self.model):
            raise KVQError(
                "attention weights are asked for; attention over packed pages has none to return.",
                hint="output_attentions=False",
            )
        if torch.is_grad_enabled() and self.model.training:
            raise KVQError(
                "the model is in training mode; a packed cache serves inference only.",
                hint="model.eval(), or rule='evaluation' for a plain forward",
            )
        cache = adopt(arguments.get("past_key_values"), self.model, self.codecs)
        inputs = arguments.get("input_ids")
        if inputs is None:
            inputs = arguments.get("inputs_embeds")
        if inputs is None:
            raise KVQError("a forward without input_ids or inputs_embeds.")
        self.close()
        wanted = arguments.get("use_cache")
        if wanted is None:
            wanted = getattr(self.model.config.get_text_config(decoder=True), "use_cache", True)
        self.keeps_cache = bool(wanted) or arguments.get("past_key_values") is not None
        self.all_packed = all(isinstance(layer, PackedLayer) for layer in cache.layers)
        # Weakly: who drops a cache gets its memory back, and not only at the next forward.
        self.cache, self.shape = weakref.ref(cache), (inputs.shape[0], inputs.shape[1])
        slots = cache.get_seq_length()
        self.forward = self._step_of(cache)
        if self.forward is None:
            self.attended = self._attended(arguments.get("attention_mask"), cache)
        is_step = self.forward is not None
        self.stock_prefill = self.rule == "exact-prefill" and slots == 0 and not is_step
        if not is_step and not rotary_modules(self.model.base_model):
            # Nobody will ask for the rotation of positions: no layer has RoPE.
            places = torch.arange(slots, slots + self.shape[1], device=inputs.device)
            self.on_positions(places[None])
        return {"past_key_values": cache}

    def on_output(self, output: Any) -> Any:
        """Keep a cache that nobody asked for to this forward, which could not do without."""
        if self.keeps_cache:
            return output
        if isinstance(output, ModelOutput):
            kept = {name: value for name, value in output.items() if not isinstance(value, Cache)}
            return type(output)(**kept)
        return tuple(value for value in output if not isinstance(value, Cache))

    def on_positions(self, position_ids: Tensor) -> None:
        """Make the forward known to the layers, which store positions."""
        if self.forward is not None:
            # Models with several rotations ask once for each, always for the same positions.
            return
        B, T = self.shape
        if position_ids.dim() == 3 and bool((position_ids == position_ids[:1]).all()):
            position_ids = position_ids[0]
        if position_ids.dim() != 2 or position_ids.shape[-1] != T:
            raise UnsupportedModelError(
                f"positions of shape {list(position_ids.shape)}, expected [{B}, {T}]; positions "
                "of several axes (images, video) are not supported."
            )
        # Read once; all that the host has to know of positions it knows from here.
        on_host = position_ids.cpu()
        check_positions(on_host, self.attended)
        rows: list[Tensor | None] = [None] * B
        if self.attended is not None:
            rows = [None if row.all() else row for row in self.attended]
        self.forward = Forward(
            attended=[
                None if row is None else row.nonzero()[:, 0].to(position_ids.device) for row in rows
            ],
            runs=[[(0, T)] if row is None else spans(row) for row in rows],
            positions=position_ids.to(torch.int32).expand(B, T),
            impl=self.impl,
            host_positions=on_host,
        )
        cache = self.cache()
        assert cache is not None
        for layer in packed_layers(cache):
            layer.forward = self.forward

    def mask_function(self, stock: MaskFunction) -> MaskFunction:
        """Masks for stock layers; packed ones mask for themselves, at any length."""

        def mask(*args: Any, **kwargs: Any) -> Any:
            if self.stock_prefill:
                return stock(*args, **kwargs)
            if kwargs.get("local_size") is not None:
                # Where every layer has a window, all are packed, and no text outgrows it.
                return None if self.all_packed else stock(*args, **kwargs)
            if kwargs.get("mask_function") is not causal_mask_function:
                raise UnsupportedModelError(
                    "the model masks its attention in a way of its own (not causal over the whole "
                    "context); packed pages are read causally."
                )
            return None

        return mask

    def on_rotary(self, call: RotaryCall) -> tuple[Tensor, Tensor]:
        """Let both through as they are: the key is cached so, the query is rotated later."""
        if call.layer_idx not in self.codecs:
            return call.rotate(call.query, call.key)
        if self.forward is None:
            raise UnsupportedModelError(
                "the model rotates its keys without having asked for positions; kvq cannot know "
                "where they are."
            )
        # An object of its own, by which the key is known when it is cached.
        return call.query, self.forward.expect_key(call.key[...])

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attend over packed pages, or as the model does where a layer is not packed."""
        states: Any = call.key
        codec = self.codecs.get(call.layer_idx)
        if not isinstance(states, PackedStates):
            if codec is not None:
                raise UnsupportedModelError(
                    f"layer {call.layer_idx} attends to keys that did not come from the cache."
                )
            return call.attend(call.query, call.key, call.value)
        assert codec is not None
        tokens = max((row.tokens for row in states.layer.rows), default=0)
        if isinstance(self.forward, StepForward):
            _check_window(call.options, states.layer.get_max_length())
        options = attention_options(call.options, tokens=tokens, head_dim=states.shape[-1])
        if self.stock_prefill:
            states.layer.end_reading()
            fed: Any = call.value
            return call.attend(*_rotated_by_the_model(call, states.fed, codec), fed.fed)
        # The layer's own codec: that of the attachment has its tables on no layer's device.
        query = self._rotated_query(call.query, states.layer.codec)
        return states.layer.attend(query, options, rule=self.rule).to(query.dtype), None

    def _rotated_query(self, query: Tensor, codec: PageCodec) -> Tensor:
        """``[B, HQ, T, D]``, in rotary channel order."""
        assert self.forward is not None
        ordered = codec.rotary.ordered(query)
        if codec.rotary.channels == UNROTATED:
            return ordered
        if self.impl == "triton" and query.shape[2] == 1:
            positions = self.forward.on(query.device).positions[:, 0]
            turned = codec.kernels.rotate(ordered[:, :, 0], positions, codec.rotary.angles())
            return turned[:, :, None]
        cos, sin = self.forward.cos_sin(codec.rotary, query.device)
        return rotate(ordered, cos[:, None], sin[:, None]).to(query.dtype)

    def _step_of(self, cache: Cache) -> Forward | None:
        """The forward of a captured step, if this is one: all that it reads is on the device."""
        step: Forward | None = cache.step
        if step is not None:
            for layer in packed_layers(cache):
                layer.forward = step
        return step

    def _attended(self, mask: Tensor | None, cache: Cache) -> Tensor | None:
        """Bool ``[B, T]`` of this forward's tokens, on the CPU; None if all are attended.

        Raises KVQError for masks of another shape, and where padding of earlier forwards changed.
        """
        B, T = self.shape
        slots = cache.get_seq_length()
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise KVQError(
                f"attention_mask is {shape}; packed pages are read causally and take a padding "
                "mask [batch, tokens] or none.",
                hint="leave custom masks out",
            )
        if tuple(mask.shape) != (B, slots + T):
            raise KVQError(
                f"attention_mask is {list(mask.shape)}, expected [{B}, {slots + T}]: "
                f"{slots} tokens in the cache and {T} new ones.",
                hint="the mask covers the tokens that the cache holds, too",
            )
        mask = mask.bool().cpu()
        layer = next(packed_layers(cache))
        if slots and not torch.equal(mask[:, :slots], attended_mask(layer.rows, slots)):
            raise KVQError(
                "attention_mask differs from the one that earlier tokens were cached with; "
                "padding is not stored and cannot be attended later, nor tokens be hidden.",
                hint="pass the earlier mask with the new tokens' behind it",
            )
        current = mask[:, slots:]
        return None if bool(current.all()) else current


def _rotated_by_the_model(
    call: AttentionCall, key: Tensor, codec: PageCodec
) -> tuple[Tensor, Tensor]:
    """Query and key ``[B, heads, T, D]`` as the stock model would attend with them."""
    if call.rotary is None:
        return call.query, key
    start, stop = channels = codec.rotary.channels
    parts = call.rotary.rotate(call.query[..., start:stop], key[..., start:stop])
    return splice(call.query, parts[0], channels), splice(key, parts[1], channels)


def attention_options(
    options: Mapping[str, Any], *, tokens: int, head_dim: int
) -> AttentionOptions:
    """What the model asks of attention; refuses what is not honoured.

    Raises UnsupportedModelError for windows shorter than ``tokens``, dropout, and options that kvq
    does not know.
    """
    unknown = {
        name
        for name, value in options.items()
        if value is not None and name not in HONOURED_OPTIONS | HARMLESS_OPTIONS
    }
    # Causal is what packed pages are; a model may say so.
    if options.get("is_causal") in (None, True):
        unknown.discard("is_causal")
    for name in sorted(unknown):
        raise UnsupportedModelError(
            f"attention option {name} is not honoured over packed pages.",
            hint='rule="evaluation" leaves attention to the model',
        )
    if options.get("dropout"):
        raise UnsupportedModelError(
            f"attention dropout is {options['dropout']:g}; a packed cache serves inference only.",
            hint="model.eval()",
        )
    window = options.get("sliding_window")
    if window is not None and tokens > window:
        raise UnsupportedModelError(
            f"the layer attends to a window of {window} tokens and the cache holds {tokens}.",
            hint=f"at most {window} tokens of context",
        )
    scaling = options.get("scaling")
    return AttentionOptions(
        scaling=head_dim**-0.5 if scaling is None else float(scaling),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )


def _check_window(options: Mapping[str, Any], capacity: int) -> None:
    """Refuse a window that a captured step could outgrow, which nothing would notice."""
    window = options.get("sliding_window")
    if window is not None and capacity > window:
        raise UnsupportedModelError(
            f"the layer attends to a window of {window} tokens and the cache has room for "
            f"{capacity}; a captured step does not notice when the window is full.",
            hint=f"a capacity of at most {window} tokens, or --no-cuda-graph",
        )


def _config_wants_attentions(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "output_attentions", False))


@contextmanager
def attach_pages(
    model: PreTrainedModel,
    codecs: Mapping[int, PageCodec],
    *,
    rule: Rule = "runtime",
    impl: ImplementationName = "reference",
) -> Iterator[PreTrainedModel]:
    """Run ``model`` on packed pages of ``codecs``; restored on exit."""
    tap = RuntimeTap(model, codecs, rule=rule, impl=impl)
    with tap_attention(model, tap):
        _attached[model] = tap
        try:
            yield model
        finally:
            del _attached[model]
            tap.close()


_attached: weakref.WeakKeyDictionary[PreTrainedModel, RuntimeTap] = weakref.WeakKeyDictionary()


def attached_tap(model: PreTrainedModel) -> RuntimeTap | None:
    """The tap of the attachment that is open now; None where there is none."""
    return _attached.get(model)
