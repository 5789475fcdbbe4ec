"""Per-token log-probs of responses, computed in microbatches that never change the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from powerflow_lit.models.guard import allowed_tokens, log_prob_over
from powerflow_lit.types import AllowedTokens, TokenBatch

Pool = Literal["mean", "last"]


@dataclass(frozen=True)
class Scores:
    """What one forward pass over prompts and responses yields."""

    log_prob: Tensor  # (N, T) float32, nats, at the temperature asked for; 0 in the padding
    prompt_state: Tensor | None  # (N, h) pooled hidden states of the prompt, if asked for


@dataclass(frozen=True)
class GuardedResponse:
    """A response of L tokens under the policy that sampled it, and what min-p allows there."""

    log_prob_full: Tensor  # (L,) float32, nats, full vocabulary
    log_prob: Tensor  # (L,) float32, nats, over the allowed tokens
    allowed: AllowedTokens  # L places


def microbatches(lengths: Tensor, tokens_per_microbatch: int) -> list[Tensor]:
    """Row indices sorted by length and cut so that no padded microbatch exceeds the budget.

    A single sequence longer than the budget stands alone.
    """
    order = torch.argsort(lengths, stable=True)
    parts: list[list[int]] = [[]]
    for row in order.tolist():
        # ascending lengths: the newcomer is the widest
        if parts[-1] and (len(parts[-1]) + 1) * int(lengths[row]) > tokens_per_microbatch:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part, device=lengths.device) for part in parts]


def response_scores(
    model: nn.Module,
    batch: TokenBatch,
    *,
    tokens_per_microbatch: int,
    pool: Pool | None = None,
    on_progress: Callable[[int], None] | None = None,
    temperature: float = 1.0,
) -> Scores:
    """Log-probs of the response tokens, and pooled prompt states when `pool` is given.

    They are over the full vocabulary, or over `batch.allowed` where a guard has set it, of the
    softmax of logits / `temperature`.

    With more than one microbatch under gradient, each is recomputed in the backward pass, so that
    any loss over all N trajectories (group closed forms included) has the gradient of the whole
    batch at the memory of one microbatch.
    """
    parts = microbatches(batch.lengths, tokens_per_microbatch)
    width = int(batch.response_lengths.max())
    recompute = torch.is_grad_enabled() and len(parts) > 1
    pieces, states = [], []
    for part in parts:
        rows = batch.rows(part)
        if recompute:
            packed, state = checkpoint(
                _packed_scores, model, rows, pool, temperature, use_reentrant=False
            )
        else:
            packed, state = _packed_scores(model, rows, pool, temperature)
        padded = packed.new_zeros(len(part), width)
        mask = torch.arange(width, device=part.device) < rows.response_lengths[:, None]
        pieces.append(padded.masked_scatter(mask, packed))
        states.append(state)
        if on_progress is not None:
            on_progress(len(part))
    back = torch.argsort(torch.cat(parts))  # from microbatch order to the batch's
    log_prob = torch.cat(pieces)[back]
    return Scores(log_prob, None if pool is None else torch.cat(states)[back])


@torch.no_grad()
def guarded_responses(
    model: nn.Module, batch: TokenBatch, *, min_p: float, tokens_per_microbatch: int
) -> list[GuardedResponse]:
    """What min-p allows at each response token under the model: N records, on the CPU."""
    parts = microbatches(batch.lengths, tokens_per_microbatch)
    found: dict[int, GuardedResponse] = {}
    for part in parts:
        rows = batch.rows(part)
        logits, targets, _ = _response_logits(model, rows)
        allowed = allowed_tokens(logits, targets, min_p)
        full = -nn.functional.cross_entropy(logits, targets, reduction="none")
        restricted = log_prob_over(logits, targets, allowed)
        places = rows.response_lengths.tolist()
        pieces = zip(
            full.split(places), restricted.split(places), allowed.split(places), strict=True
        )
        found |= {
            row: GuardedResponse(full_row.cpu(), restricted_row.cpu(), sets.to(torch.device("cpu")))
            for row, (full_row, restricted_row, sets) in zip(part.tolist(), pieces, strict=True)
        }
    return [found[row] for row in range(len(found))]


def _packed_scores(
    model: Any, batch: TokenBatch, pool: Pool | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of all response tokens in a row (M,), and prompt states (N, h)."""
    logits, targets, hidden = _response_logits(model, batch)
    if temperature != 1:
        logits = logits / temperature
    if batch.allowed is None:
        log_prob = -nn.functional.cross_entropy(logits, targets, reduction="none")
    else:
        log_prob = log_prob_over(logits, targets, AllowedTokens.cat(batch.allowed))
    return log_prob, None if pool is None else pool_prompt(hidden, batch.prompt_lengths, pool)


def _response_logits(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all response tokens in a row (M, V) float32, the tokens (M,), hidden (N, S, h)."""
    # Right padding under causal attention: no padded key precedes a real token, so no mask.
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    position = torch.arange(batch.input_ids.shape[1], device=hidden.device)  # (S,)
    start, end = batch.prompt_lengths[:, None], batch.lengths[:, None]
    predicts = (position >= start - 1) & (position < end - 1)  # (N, S): the next token is response
    targets = batch.input_ids.roll(-1, 1)[predicts]  # (M,)
    return _logits(model, hidden[predicts]), targets, hidden


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits in float32, (M, h) -> (M, V), with the architecture's soft cap if it has one."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def pool_prompt(hidden: Tensor, prompt_lengths: Tensor, pool: Pool) -> Tensor:
    """Mean or last hidden state of the prompt tokens, (N, S, h) -> (N, h) float32."""
    if pool == "last":
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, prompt_lengths - 1].float()
    inside = torch.arange(hidden.shape[1], device=hidden.device) < prompt_lengths[:, None]
    summed = torch.where(inside[..., None], hidden.float(), 0.0).sum(1)
    return summed / prompt_lengths[:, None]


def prompt_states(model: Any, batch: TokenBatch, pool: Pool) -> Tensor:
    """Pooled prompt states from a pass over the prompts alone, (N, h)."""
    width = int(batch.prompt_lengths.max())
    hidden = model.base_model(input_ids=batch.input_ids[:, :width], use_cache=False)
    return pool_prompt(hidden.last_hidden_state, batch.prompt_lengths, pool)
