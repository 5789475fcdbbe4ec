"""Per-token log-probs of responses, computed in microbatches that never change the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.guard import allowed_tokens, log_prob_over
from powerflow_lit.models.linear_log_prob import (
    LogitShape,
    compute_dtype,
    linear_log_prob,
    row_chunks,
)
from powerflow_lit.types import AllowedTokens, TokenBatch

Pool = Literal["mean", "last"]


@dataclass(frozen=True)
class Scores:
    """What one forward pass over prompts and responses yields."""

    log_prob: Tensor  # (N, T) float32, nats; 0 in the padding
    prompt_state: Tensor | None  # (N, h) pooled hidden states of the prompt, if asked for


@dataclass(frozen=True)
class GuardedResponse:
    """A response of L tokens under the policy that sampled it, and what min-p allows there."""

    log_prob_full: Tensor  # (L,) float32, nats, full vocabulary
    log_prob: Tensor  # (L,) float32, nats, over the allowed tokens
    allowed: AllowedTokens  # L places


@dataclass(frozen=True)
class OutputLayer:
    """How a causal language model turns its trunk's last hidden states into logits."""

    weight: Tensor  # (V, h)
    bias: Tensor | None  # (V,)
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, model: Any) -> OutputLayer:
        """The model's own; `check_output_layer` finds out whether that is all there is to it.

        Raises:
            ModelError: the layer is none that is known, e.g. it carries an adapter.
        """
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"the output layer of {type(model).__name__} is a {type(layer).__name__}: only a "
                "plain linear layer is supported, without an adapter of its own"
            )
        # Cohere multiplies the logits, Granite divides them
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, getattr(layer, "bias", None), scale, cap)

    def rows_per_chunk(self, logit_chunk_mb: float) -> int:
        """Rows of float32 logits that fit into so many MB (10^6 bytes); at least one."""
        return max(1, int(logit_chunk_mb * 1e6 / (4 * len(self.weight))))


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
    logit_chunk_mb: float,
    temperature: float = 1.0,
    pool: Pool | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Log-probs of the response tokens, and pooled prompt states when `pool` is given.

    They are over the full vocabulary, or over `batch.allowed` where a guard has set it, and at
    `temperature`. No more than `logit_chunk_mb` MB of logits exist at a time.

    With more than one microbatch under gradient, each is recomputed in the backward pass, so that
    any loss over all N trajectories (group closed forms included) has the gradient of the whole
    batch at the memory of one microbatch.
    """
    parts = microbatches(batch.lengths, tokens_per_microbatch)
    width = int(batch.response_lengths.max())
    recompute = torch.is_grad_enabled() and len(parts) > 1
    score = partial(
        _packed_scores, model, pool=pool, temperature=temperature, logit_chunk_mb=logit_chunk_mb
    )
    pieces, states = [], []
    for part in parts:
        rows = batch.rows(part)
        if recompute:
            packed, state = checkpoint(score, rows, use_reentrant=False)
        else:
            packed, state = score(rows)
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
    model: nn.Module,
    batch: TokenBatch,
    *,
    min_p: float,
    tokens_per_microbatch: int,
    logit_chunk_mb: float,
) -> list[GuardedResponse]:
    """What min-p allows at each response token under the model: N records, on the CPU."""
    output = OutputLayer.of(model)
    shape, dtype = LogitShape(output.scale, output.soft_cap, 1.0), compute_dtype(output.weight)
    parts = microbatches(batch.lengths, tokens_per_microbatch)
    found: dict[int, GuardedResponse] = {}
    for part in parts:
        rows = batch.rows(part)
        hidden, targets, _ = _response_states(model, rows)
        chunks = []
        for chunk in row_chunks(len(hidden), output.rows_per_chunk(logit_chunk_mb)):
            logits = shape.logits(hidden[chunk], output.weight, output.bias, dtype)
            chunks.append(_guarded_chunk(logits, targets[chunk], min_p))
            del logits  # before the next chunk's
        fulls, restricteds, sets = zip(*chunks, strict=True)
        full, restricted = torch.cat(fulls), torch.cat(restricteds)
        allowed = AllowedTokens.cat(sets)
        places = rows.response_lengths.tolist()
        pieces = zip(
            full.split(places), restricted.split(places), allowed.split(places), strict=True
        )
        found |= {
            row: GuardedResponse(full_row.cpu(), restricted_row.cpu(), sets.to(torch.device("cpu")))
            for row, (full_row, restricted_row, sets) in zip(part.tolist(), pieces, strict=True)
        }
    return [found[row] for row in range(len(found))]


def _guarded_chunk(
    logits: Tensor, targets: Tensor, min_p: float
) -> tuple[Tensor, Tensor, AllowedTokens]:
    """Log-probs over everything and over what is allowed, (rows,) each, and what is allowed."""
    allowed = allowed_tokens(logits, targets, min_p)
    full = -nn.functional.cross_entropy(logits, targets, reduction="none")
    return full, log_prob_over(logits, targets, allowed), allowed


def _packed_scores(
    model: Any, batch: TokenBatch, *, pool: Pool | None, temperature: float, logit_chunk_mb: float
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of all response tokens in a row (M,), and prompt states (N, h)."""
    states, targets, hidden = _response_states(model, batch)
    output = OutputLayer.of(model)
    log_prob = linear_log_prob(
        states,
        output.weight,
        targets,
        bias=output.bias,
        scale=output.scale,
        soft_cap=output.soft_cap,
        temperature=temperature,
        rows_per_chunk=output.rows_per_chunk(logit_chunk_mb),
        allowed=None if batch.allowed is None else AllowedTokens.cat(batch.allowed),
    )
    return log_prob, None if pool is None else pool_prompt(hidden, batch.prompt_lengths, pool)


def _response_states(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict the response tokens (M, h), these tokens (M,), all (N, S, h)."""
    # Right padding under causal attention: no padded key precedes a real token, so no mask.
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    position = torch.arange(batch.input_ids.shape[1], device=hidden.device)  # (S,)
    start, end = batch.prompt_lengths[:, None], batch.lengths[:, None]
    predicts = (position >= start - 1) & (position < end - 1)  # (N, S): the next token is response
    targets = batch.input_ids.roll(-1, 1)[predicts]  # (M,)
    return hidden[predicts], targets, hidden


@torch.no_grad()
def check_output_layer(model: Any) -> None:
    """Compare log-probs as computed here with those of the model's own logits, on a few tokens.

    Raises:
        ModelError: they differ; the architecture does more to its logits than `OutputLayer` knows.
    """
    size = len(OutputLayer.of(model).weight)
    ids = [k * size // 8 for k in range(8)]  # one alone may be the padding, whose embedding is 0
    batch = TokenBatch.collate([(ids[:1], ids[1:])], 0).to(model.device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, batch.input_ids[0, 1:, None])[:, 0]
    own = response_scores(model, batch, tokens_per_microbatch=8, logit_chunk_mb=1.0).log_prob[0]
    gap = float((own - expected).abs().max())
    rounding = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    if not gap <= rounding * max(1.0, float(logits.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: log-probs computed from its hidden states are {gap:.3g} nats "
            "off its own; its logits are made in a way that is not supported (known are a bias, "
            "logit_scale, logits_scaling and final_logit_softcapping)"
        )


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
