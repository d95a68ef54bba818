"""Decode steps that are captured in a CUDA graph once, and replayed for every token.

A step of a model is hundreds of small launches, and the Python that makes them takes several times
as long as a GPU that reads packed codes. Captured, all of them are one launch. What the step needs
of the host happens between replays: the token goes in, counts are compared, and once in 256 tokens
a full page is packed. None of it waits for the device.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvq_formats.errors import KVQError
from kvq_runtime.cache import PackedCache, check_whole, packed_layers
from kvq_runtime.cache_argument import CACHE, as_taken, cache_name, with_one_name
from kvq_runtime.capturable import check_capturable, check_cuda, check_token_ids
from kvq_runtime.cuda_graph import Capture, CaptureError, Recording, capture_cuda_graph
from kvq_runtime.decode_step import DecodeStep
from kvq_runtime.layer_step import addresses, count_token, prepare_token
from kvq_runtime.modes import lasting_tensors
from kvq_runtime.offload import input_device
from kvq_runtime.rope import named_arguments
from kvq_runtime.runtime_rule import attached_tap
from kvq_runtime.step_arguments import StepArguments

logger = logging.getLogger(__name__)


@dataclass
class _Patch:
    """A forward that stands in for a model's own: what was there, and whether it still counts."""

    before: Callable[..., Any] | None
    is_open: bool = True


_patches: weakref.WeakKeyDictionary[Callable[..., Any], _Patch] = weakref.WeakKeyDictionary()


class CapturedDecode(AbstractContextManager["CapturedDecode"]):
    """One token a row at a time, on an attached model and a packed cache with a capacity.

    ``step`` is the whole of it. As a context manager it also takes the model's own forwards of one
    token a row, so that ``model.generate`` replays; every other forward runs as it would without.
    The first step captures, and so does the first after tensors had to move.

    Fields:
        captures, replays: steps that were captured, and that were replayed.
        refused: why forwards run eagerly, where a capture failed and that was allowed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PackedCache,
        *,
        eager_if_refused: bool = False,
        capture: Capture | None = None,
    ) -> None:
        """Nothing is captured yet.

        Args:
            model: inside ``kvq.attach`` on Triton kernels; on one GPU.
            cache: of a capacity, with or without tokens.
            eager_if_refused: forwards whose capture fails run eagerly, ``refused`` and the log say
                why; ``step`` fails.
            capture: what captures; a CUDA graph without.

        Raises KVQError where such a step cannot be captured, and says why.
        """
        if capture is None:
            # First: without a GPU no other change would help.
            check_cuda(input_device(model))
        self.model, self.cache = model, cache
        self.device = check_capturable(model, cache)
        self.captures = self.replays = 0
        self.refused: CaptureError | None = None
        self._eager_if_refused = eager_if_refused
        self._capture = capture or capture_cuda_graph
        self._tap = attached_tap(model)
        self._layers = list(packed_layers(cache))
        self._recorded: Recording | None = None
        self._recorded_for: tuple[object, ...] = ()
        self._stock: Any = model.forward
        self._patched: Callable[..., Any] | None = None
        self._passed = self._replays_before = 0
        self._new_rows()

    def step(self, token_ids: Tensor) -> Tensor:
        """Feed one token of each row, attended and at the position after its last one.

        Args:
            token_ids: integers ``[B]`` or ``[B, 1]``, on any device.

        Returns: logits of what comes next, ``[B, V]``; the next step writes over them.

        Raises:
            CacheFullError: there is no room for another token.
            CaptureError: the model does what a CUDA graph cannot hold.
            KVQError: token_ids is no such tensor, or the attachment is closed.
        """
        if attached_tap(self.model) is not self._tap:
            raise KVQError(
                "the attachment that this step was captured in is closed.",
                hint="a new kvq.CapturedDecode inside `with kvq.attach(...)`",
            )
        check_whole(self.cache)
        first = self._layers[0]
        self._match_rows()
        B = len(first.rows)
        check_token_ids(token_ids, B)
        for layer in self._layers:
            prepare_token(layer)
        recorded = self._recording()
        self._step.follow(first.rows)
        self._step.token_ids.copy_(token_ids.view(B, 1), non_blocking=True)
        # Until all layers have counted what the device does, the cache is not whole.
        first.torn = True
        recorded.replay()
        for layer in self._layers:
            count_token(layer)
        first.torn = False
        self._step.followed(first.rows)
        self.replays += 1
        logits: Tensor = recorded.result.logits[:, -1]
        return logits

    def __enter__(self) -> Self:
        if self._patched is not None:
            raise KVQError(
                "this CapturedDecode is open already.",
                hint="leave its `with` first; inside, the model replays as it is",
            )
        patch = _Patch(self.model.__dict__.get("forward"))
        self._stock = stock = self.model.forward
        self._passed, self._replays_before = 0, self.replays

        # With the signature of the stock forward, which generate inspects.
        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Closed, it may still be called by one that was opened later and is open.
            return (self._forward if patch.is_open else stock)(*args, **kwargs)

        # An instance's own forward is what a call of the model finds.
        self.model.forward = self._patched = forward
        _patches[forward] = patch
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        forward, self._patched = self._patched, None
        self._recorded = None
        if forward is None:
            return
        _patches[forward].is_open = False
        # Another forward on top stays; who put it there takes ours away, too, if it is one of us.
        if self.model.__dict__.get("forward") is forward:
            _restore(self.model, forward)
        if kind is None and self.refused is None and self.replays == self._replays_before:
            self._say_what_passed()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: replayed where it goes on by one token a row, else its own."""
        # A step that is captured now, by another one for the same cache, is captured as it is.
        if self.refused is not None or self.cache.step is not None:
            return self._stock(*args, **kwargs)
        self._match_rows()
        given = with_one_name(named_arguments(self._stock, args, kwargs))
        ids = self._arguments.token_ids(given)
        if ids is None:
            fed = given.get("input_ids")
            self._passed += isinstance(fed, Tensor) and fed.shape[-1] == 1
            return self._stock(*args, **kwargs)
        try:
            logits = self.step(ids)
        except CaptureError as refused:
            if not self._eager_if_refused:
                raise
            self.refused = refused
            logger.warning("decode steps run eagerly: %s", refused.message)
            return self._stock(*args, **kwargs)
        assert self._recorded is not None
        kind: Any = type(self._recorded.result)
        # A copy: who calls a model keeps what it returned.
        result = {"logits": logits[:, None].clone(), CACHE: self.cache}
        return kind(**as_taken(kind, result))

    def _say_what_passed(self) -> None:
        if self._passed:
            logger.warning(
                "none of %d forwards of one token was replayed: they did not go on where the cache "
                "of this CapturedDecode stands, or asked for more than logits; pass that cache as "
                "%s",
                self._passed,
                cache_name(self._stock),
            )

    def _match_rows(self) -> None:
        """Start anew where the cache has another number of rows by now."""
        if len(self._layers[0].rows) != len(self._step.token_ids):
            self._new_rows()

    def _new_rows(self) -> None:
        layer = self._layers[0]
        self._step = DecodeStep(
            len(layer.rows), sink_tokens=layer.codec.sink_tokens, device=self.device
        )
        self._arguments = StepArguments(self.cache, self._step)
        self._recorded = None

    def _recording(self) -> Recording:
        """What is replayed; captured anew where something that it knows by address has moved."""
        now = (
            torch.is_autocast_enabled(self.device.type),
            *(address for layer in self._layers for address in addresses(layer)),
        )
        if self._recorded is None or self._recorded_for != now:
            # Its memory is free before the next one is captured.
            self._recorded = None
            try:
                with lasting_tensors():
                    self._recorded = self._capture(self._run, self._prepare, self.device)
            except CaptureError:
                raise
            except KVQError as refused:
                raise CaptureError(refused.message, hint=refused.hint) from refused
            self._recorded_for = now
            self.captures += 1
            # Warming up has moved counts on, and has put tokens where the next one goes.
            self._step.forget()
        return self._recorded

    def _prepare(self) -> None:
        self._step.forget()
        self._step.follow(self._layers[0].rows)

    def _run(self) -> Any:
        """The step itself: everything in here is captured."""
        self.cache.step = self._step.begin()
        try:
            arguments = {
                "input_ids": self._step.token_ids,
                "position_ids": self._step.position_ids,
                CACHE: self.cache,
                "use_cache": True,
                "return_dict": True,
            }
            output = self._stock(**as_taken(self._stock, arguments))
        finally:
            self.cache.step = None
        self._step.end()
        return output


def _restore(model: PreTrainedModel, forward: Callable[..., Any]) -> None:
    """Put back what was there before ``forward``, and before those below it that are closed."""
    before: Callable[..., Any] | None = forward
    while before is not None and (patch := _patches.get(before)) and not patch.is_open:
        before = patch.before
    if before is None:
        del model.forward
    else:
        model.forward = before
