"""A sampler without an engine around it: static key-value cache, each prompt's prefill once.

The bound of the rollout. It knows every length beforehand, so that finished rows leave the batch at
once and nothing is padded but the cache; it returns tokens and keeps no log-probs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class StaticSampler:
    """Samples from a Llama model at temperature 1.

    Args:
        model: `LlamaForCausalLM`.
        prompts: token ids of each prompt.
        lengths: tokens of each response, prompt by prompt.
    """

    def __init__(
        self, model: Any, prompts: list[tuple[int, ...]], lengths: list[list[int]]
    ) -> None:
        self.model = model
        config = model.config
        rows = [(p, n) for p, group in enumerate(lengths) for n in group]
        rows.sort(key=lambda row: -row[1])  # so that those still running are the first rows
        device = model.device
        self.of_prompt = torch.tensor([p for p, _ in rows], device=device)
        self.lengths = [n for _, n in rows]
        self.sizes = torch.tensor([len(p) for p in prompts], device=device)
        width = max(map(len, prompts))
        self.prompts = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.prompts[row, : len(prompt)] = torch.tensor(prompt)
        room = max(len(prompts[p]) + n for p, n in rows)
        shape = (len(rows), config.num_key_value_heads, room, config.head_dim)
        self.cache = [
            tuple(torch.zeros(shape, dtype=model.dtype, device=device) for _ in ("key", "value"))
            for _ in range(config.num_hidden_layers)
        ]

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, int]:
        """Sampled tokens (rows, longest), rows by falling length, and how many of them count."""
        logits = self._prefill()
        tokens = torch.zeros(len(self.lengths), self.lengths[0], dtype=torch.long)
        starts = self.sizes[self.of_prompt]
        sampled = 0
        for step in range(self.lengths[0]):
            active = sum(n > step for n in self.lengths)
            chosen = draw(logits[:active])
            tokens[:active, step] = chosen.cpu()
            sampled += active
            active = sum(n > step + 1 for n in self.lengths)
            if active:
                logits = self._decode(chosen[:active], starts[:active] + step)
        return tokens, sampled

    def _prefill(self) -> Tensor:
        """Logits after each row's prompt; the prompts' keys and values go to all their rows."""
        width = self.prompts.shape[1]
        hidden = self.model.model.embed_tokens(self.prompts)
        place = torch.arange(width, device=hidden.device)[None]
        angles = self.model.model.rotary_emb(hidden, place)
        for layer, (keys, values) in zip(self.model.model.layers, self.cache, strict=True):
            q, k, v = projected(layer, hidden, angles)
            keys[:, :, :width], values[:, :, :width] = k[self.of_prompt], v[self.of_prompt]
            seen = attend(q, k, v, is_causal=True, enable_gqa=True)
            hidden = finished(layer, hidden, seen)
        last = hidden[torch.arange(len(hidden), device=hidden.device), self.sizes - 1]
        return self._logits(last)[self.of_prompt]

    def _decode(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Logits after one more token a row. tokens, place: (active,)."""
        active, room = len(tokens), int(place.max()) + 1
        hidden = self.model.model.embed_tokens(tokens[:, None])
        angles = self.model.model.rotary_emb(hidden, place[:, None])
        rows = torch.arange(active, device=tokens.device)
        mask = (torch.arange(room, device=tokens.device) <= place[:, None])[:, None, None]
        for layer, (keys, values) in zip(self.model.model.layers, self.cache, strict=True):
            q, k, v = projected(layer, hidden, angles)
            keys[rows, :, place], values[rows, :, place] = k[:, :, 0], v[:, :, 0]
            kept = keys[:active, :, :room], values[:active, :, :room]
            # the queries that share a key's head stand as rows of one small matrix product
            grouped = q.view(active, keys.shape[1], -1, q.shape[-1])
            seen = attend(grouped, *kept, attn_mask=mask).reshape(active, -1, 1, q.shape[-1])
            hidden = finished(layer, hidden, seen)
        return self._logits(hidden[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))  # type: ignore[no-any-return]


def projected(layer: Any, hidden: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, (rows, heads, tokens, head size) each."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    q, k, v = (
        project(normed).view(shape).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *angles)
    return q, k, v


def finished(layer: Any, hidden: Tensor, seen: Tensor) -> Tensor:
    """The layer's output, from what its attention has seen."""
    joined = seen.transpose(1, 2).reshape(*hidden.shape[:2], -1)
    hidden = hidden + layer.self_attn.o_proj(joined)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


def draw(logits: Tensor) -> Tensor:
    """One token a row, (rows,): the largest of the logits with Gumbel noise."""
    noise = torch.empty_like(logits).exponential_().log_()
    return (logits - noise).argmax(-1)
