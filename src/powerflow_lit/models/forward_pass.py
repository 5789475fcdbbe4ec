"""A model's pass over prompts and responses, packed where it can be and padded where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from powerflow_lit.models.packed_attention import hidden_states
from powerflow_lit.models.packing import PackedBatch, pack, packed_microbatches
from powerflow_lit.models.sharding import in_one_pass, passes_of_all_ranks
from powerflow_lit.models.z_head import Pool
from powerflow_lit.types import AllowedTokens, TokenBatch


class ForwardPass(Protocol):
    """Some rows of a batch, taken at once. n rows, R response tokens."""

    @property
    def rows(self) -> Tensor:
        """(n,) which rows of the batch, in the order of what follows."""
        ...

    @property
    def allowed(self) -> AllowedTokens | None:
        """What a guard allows at each of the R places; None is everything."""
        ...

    def states(self, model: Any, pool: Pool | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states that predict the response tokens (R, h), these tokens (R,), and pooled
        states of each row's prompt (n, h) float32 if asked for."""
        ...


@dataclass(frozen=True)
class PaddedPass:
    """Rows as they stand, padded to the longest, each with its prompt."""

    rows: Tensor
    batch: TokenBatch  # of these rows alone

    @property
    def allowed(self) -> AllowedTokens | None:
        return None if self.batch.allowed is None else AllowedTokens.cat(self.batch.allowed)

    def states(self, model: Any, pool: Pool | None) -> tuple[Tensor, Tensor, Tensor | None]:
        # Right padding under causal attention: no padded key precedes a real token, so no mask.
        batch = self.batch
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        position = torch.arange(batch.input_ids.shape[1], device=hidden.device)  # (S,)
        start, end = batch.prompt_lengths[:, None], batch.lengths[:, None]
        predicts = (position >= start - 1) & (position < end - 1)  # (n, S): the next is response
        targets = batch.input_ids.roll(-1, 1)[predicts]  # (R,)
        prompt_state = None if pool is None else _pool_padded(hidden, batch.prompt_lengths, pool)
        return hidden[predicts], targets, prompt_state


@dataclass(frozen=True)
class PackedPass:
    """Rows packed without padding, each prompt once."""

    packed: PackedBatch
    allowed: AllowedTokens | None

    @property
    def rows(self) -> Tensor:
        return self.packed.rows

    def states(self, model: Any, pool: Pool | None) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = hidden_states(model, self.packed)  # (M, h)
        prompt_state = None
        if pool is not None:
            pooled = _pool_packed(hidden, self.packed.prompt_lengths, pool)
            prompt_state = pooled[self.packed.prompt_of]
        return hidden[self.packed.predictors], self.packed.targets, prompt_state


def forward_passes(model: Any, batch: TokenBatch, tokens_per_microbatch: int) -> list[ForwardPass]:
    """All rows of a batch in passes of no more tokens than the budget.

    What a pass costs is the tokens that it holds, so that a budget means the same for both kinds:
    packed ones have no padding, padded ones count it. One sequence over the budget stands alone.

    Of a model that is spread over ranks, all ranks make as many passes: where other ranks need
    more, the first ones are of no rows, and what they compute counts for nothing.
    """
    passes: list[ForwardPass]
    if packs(model, int(batch.lengths.max())):
        parts = packed_microbatches(batch, tokens_per_microbatch)
        passes = [_packed_pass(batch, rows) for rows in parts]
    else:
        chosen = microbatches(batch.lengths, tokens_per_microbatch)
        passes = [PaddedPass(part, batch.rows(part)) for part in chosen]
    idle = passes_of_all_ranks(model, len(passes)) - len(passes)
    return [_idle_pass(batch)] * idle + passes


def packs(model: Any, longest: int) -> bool:
    """Whether rows of so many tokens, prompt and response, are packed for this model.

    `probes.allow_packing` decides it, once for each model.
    """
    return longest <= getattr(model, "packed_span", 0)


def microbatches(lengths: Tensor, tokens_per_microbatch: int) -> list[Tensor]:
    """Row indices sorted by length and cut so that no padded microbatch exceeds the budget.

    A single sequence longer than the budget stands alone.
    """
    sizes = lengths.tolist()  # at once: each look at a GPU's tensor would wait for it
    parts: list[list[int]] = [[]]
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        # ascending lengths: the newcomer is the widest
        if parts[-1] and (len(parts[-1]) + 1) * sizes[row] > tokens_per_microbatch:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part, device=lengths.device) for part in parts]


def prompt_states(model: Any, batch: TokenBatch, pool: Pool) -> Tensor:
    """Pooled prompt states from a pass over the prompts alone, each once: (N, h) float32."""
    width = int(batch.prompt_lengths.max())
    inside = torch.arange(width, device=batch.input_ids.device) < batch.prompt_lengths[:, None]
    padded = torch.where(inside, batch.input_ids[:, :width], -1)
    distinct, which = padded.unique(dim=0, return_inverse=True)  # (P, width), (N,)
    return in_one_pass(model, _prompt_states, model, distinct, pool)[which]


def _prompt_states(model: Any, prompts: Tensor, pool: Pool) -> Tensor:
    """Of distinct prompts (P, width), -1 in the padding: (P, h) float32."""
    hidden = model.base_model(input_ids=prompts.clamp(min=0), use_cache=False).last_hidden_state
    return _pool_padded(hidden, (prompts >= 0).sum(1), pool)


def _idle_pass(batch: TokenBatch) -> PaddedPass:
    """A pass over the shortest row that stands for no row."""
    shortest = batch.lengths.argmin()[None]
    return PaddedPass(shortest[:0], batch.rows(shortest))


def _packed_pass(batch: TokenBatch, rows: list[int]) -> PackedPass:
    packed = pack(batch, rows)
    if batch.allowed is None:
        return PackedPass(packed, None)
    allowed = [batch.allowed[row] for row in packed.rows.tolist()]
    return PackedPass(packed, AllowedTokens.cat(allowed))


def _pool_padded(hidden: Tensor, prompt_lengths: Tensor, pool: Pool) -> Tensor:
    """Mean or last hidden state of the prompt tokens, (n, S, h) -> (n, h) float32."""
    if pool == "last":
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, prompt_lengths - 1].float()
    inside = torch.arange(hidden.shape[1], device=hidden.device) < prompt_lengths[:, None]
    summed = torch.where(inside[..., None], hidden.float(), 0.0).sum(1)
    return summed / prompt_lengths[:, None]


def _pool_packed(hidden: Tensor, prompt_lengths: Tensor, pool: Pool) -> Tensor:
    """The same of prompts that stand first in a packed row, (M, h) -> (P, h) float32."""
    if pool == "last":
        return hidden[prompt_lengths.cumsum(0) - 1].float()
    parts = hidden[: int(prompt_lengths.sum())].float().split(prompt_lengths.tolist())
    return torch.stack([part.mean(0) for part in parts])
