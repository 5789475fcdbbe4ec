"""What `generate` of transformers lacks for rollouts: each prompt once, and no finished rows.

A refill decodes several responses to each prompt, of very different lengths. Here a prompt's keys
and values are computed once and copied to its responses; whenever a quarter of the rows has
finished, `generate` stops, those rows leave the batch, and it goes on with the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # tokens that a layer's buffer grows by: a copy of it every so many tokens
KEPT_SHARE = 0.75  # of the rows; with fewer at work, the finished ones leave the batch


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with room to grow: a token is written, where transformers' own
    layer copies all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        """held: (N, heads, L, size), or empty; new: (N, heads, more, size)."""
        assert held is not None  # initialised just before
        length = held.shape[-2] if held.numel() else 0
        end = length + new.shape[-2]
        buffer = self._buffers.get(name)
        # rows that were chosen, or a cache that was cut, are no longer this buffer's
        is_held = buffer is not None and buffer.data_ptr() == held.data_ptr()
        if buffer is None or not is_held or end > buffer.shape[-2]:
            buffer = new.new_empty((*new.shape[:-2], end + ROOM, new.shape[-1]))
            if length:
                buffer[..., :length, :] = held
            self._buffers[name] = buffer
        buffer[..., length:end, :] = new
        return buffer[..., :end, :]

    def reset(self) -> None:
        super().reset()
        self._buffers = {}


def row_cache(model: Any) -> DynamicCache | None:
    """An empty cache whose rows can be chosen; None for a model that has states of other kinds
    (linear attention, state spaces), or a cache of its own."""
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def prefill(model: Any, cache: DynamicCache, ids: Tensor, attention: Tensor) -> None:
    """Fill the cache with the prompts but for their last token, with which `generate` begins.

    Args:
        ids, attention: (P, W) left-padded prompts.
    """
    ids, attention = ids[:, :-1], attention[:, :-1]
    if not ids.shape[1]:
        return
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention}
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:
        inputs["position_ids"] = (attention.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in known:  # none is read
        inputs["logits_to_keep"] = 1
    model(**inputs, past_key_values=cache, use_cache=True)


class FewLeft(StoppingCriteria):
    """Ends a row at its limit or end-of-sequence token, and all of them once few are at work.

    Args:
        limits: tokens that each row may still make.
        eos_ids: end-of-sequence tokens.
        may_stop: whether rows can leave the batch; otherwise it goes on to the last of them.
        tick: called at every token; it may raise.

    Attributes:
        working: (N,) bool, rows that have not ended.
    """

    def __init__(
        self,
        limits: Sequence[int],
        eos_ids: Sequence[int],
        *,
        may_stop: bool,
        tick: Callable[[], None] | None,
    ) -> None:
        self._limits, self._eos = torch.tensor(limits), torch.tensor(list(eos_ids))
        self._may_stop, self._tick = may_stop, tick
        self._made = 0
        self.working = torch.ones(len(limits), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        if self._tick is not None:
            self._tick()
        self._made += 1
        self.working &= ~torch.isin(input_ids[:, -1].cpu(), self._eos)
        self.working &= self._limits > self._made
        left = int(self.working.sum())
        stops = self._may_stop and left <= KEPT_SHARE * len(self.working)
        ended = torch.ones_like(self.working) if stops else ~self.working
        return ended.to(input_ids.device)
