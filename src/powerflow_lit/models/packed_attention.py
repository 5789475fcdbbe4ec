"""Attention over packed rows, within the models of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.packing import Block, Layout, PackedBatch

# what some architectures add to plain attention; packed attention knows none of it
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
NO_MASK = (1, 1, 1, 1)  # a mask of four dimensions is left as it is: none is built for M * M


class PackingError(ModelError):
    """An architecture's attention is more than packed attention can compute."""


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None
) -> Tensor:
    """Causal attention within each sequence of a packed row, a response's over its prompt too.

    query (1, H, M, d), key and value (1, H_kv, M, d) -> (1, M, H, d).
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings leave float32 beside bfloat16
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (M, heads, d)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    # split, not sliced: the gradient of each slice would be as large as the whole row
    q, k, v = (x.split(layout.pieces) for x in (q, k, v))
    return torch.cat([_attend(q, k, v, block, scaling) for block in layout.blocks])[None]


Pieces = tuple[Tensor, ...]  # (tokens, H, d) each


def _attend(q: Pieces, k: Pieces, v: Pieces, block: Block, scaling: float | None) -> Tensor:
    """(tokens of the block, H, d)."""
    mask: Any = None
    keys, values = _rows(k, block), _rows(v, block)  # (n, H, L, d)
    if block.prompt is not None:
        keys, values = _after(k[block.prompt], keys), _after(v[block.prompt], values)
        mask = _lower_right(block.width, keys.shape[2], keys.device)
    out = scaled_dot_product_attention(
        _rows(q, block), keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    flat = out.transpose(1, 2).flatten(0, 1)  # (n * L, H, d)
    return flat if block.real is None else flat.index_select(0, block.real)


def _rows(x: Pieces, block: Block) -> Tensor:
    """The block's sequences, (n, H, L, d); the padding holds some token."""
    held = x[block.pieces.start : block.pieces.stop]
    tokens = held[0] if len(held) == 1 else torch.cat(held)
    if block.index is not None:
        tokens = tokens.index_select(0, block.index)
    return tokens.unflatten(0, (block.count, block.width)).transpose(1, 2)


def _after(prompt: Tensor, rows: Tensor) -> Tensor:
    """The prompt (p, H, d) before each row (n, H, L, d): (n, H, p + L, d)."""
    return torch.cat([prompt.transpose(0, 1).expand(len(rows), -1, -1, -1), rows], 2)


def _lower_right(queries: int, keys: int, device: torch.device) -> Any:
    if device.type == "cuda":  # without a mask in memory, where the kernel allows it
        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def teach_packing(model: Any) -> None:
    """Let the attention function that the model uses take packed rows as well.

    It computes what it did before, unless the model is called with `packed_layout`.

    Raises:
        PackingError: the function cannot be exchanged.
    """
    name = model.config.get_text_config()._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise PackingError(f"its attention ({name}) cannot be exchanged")
    plain = ALL_ATTENTION_FUNCTIONS[name]
    if not isinstance(plain, _PackedOrPlain):
        AttentionInterface.register(name, _PackedOrPlain(plain))


@dataclass(frozen=True)
class _PackedOrPlain:
    """A function of `transformers`' attention interface."""

    plain: Callable[..., Any]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_layout is None:
            return self.plain(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        if unknown := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
            raise PackingError(f"its attention has {unknown[0]}")
        window, longest = kwargs.get("sliding_window"), packed_layout.longest
        if window is not None and longest > window:
            raise PackingError(f"{longest} tokens exceed its sliding window of {window}")
        return packed_attention(query, key, value, packed_layout, kwargs.get("scaling")), None


def hidden_states(model: Any, packed: PackedBatch) -> Tensor:
    """The trunk's last hidden states of a packed row, (M, h)."""
    output = model.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=torch.zeros(NO_MASK, device=packed.input_ids.device),
        use_cache=False,
        packed_layout=packed.layout,
    )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]
