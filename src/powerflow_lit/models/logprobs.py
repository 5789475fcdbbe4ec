"""Per-token log-probs of responses, computed in microbatches that never change the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from powerflow_lit.models.block_states import Blocks
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.forward_pass import ForwardPass, forward_passes
from powerflow_lit.models.guard import allowed_tokens, log_prob_over
from powerflow_lit.models.linear_log_prob import (
    LogitShape,
    compute_dtype,
    linear_statistics,
    row_chunks,
)
from powerflow_lit.models.sharding import Deferred, in_one_pass, is_sharded
from powerflow_lit.models.z_head import Pool
from powerflow_lit.types import AllowedTokens, TokenBatch


@dataclass(frozen=True)
class Scores:
    """What one forward pass over prompts and responses yields."""

    log_prob: Tensor  # (N, T) float32, nats; 0 in the padding
    prompt_state: Tensor | None  # (N, h) pooled hidden states of the prompt, if asked for
    entropy: Tensor | None = None  # (N, T) float32, nats, if asked for; as log_prob
    certainty: Tensor | None = None  # the same
    block_states: Tensor | None = None  # (N, K, h) after each block but the last, if asked for
    deferred: tuple[Deferred, ...] = ()  # what is left to do after the loss's backward pass


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


def response_scores(
    model: nn.Module,
    batch: TokenBatch,
    *,
    tokens_per_microbatch: int,
    logit_chunk_mb: float,
    temperature: float = 1.0,
    pool: Pool | None = None,
    entropy_temperature: float | None = None,
    certainty: bool = False,
    block_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Log-probs of the response tokens, and pooled prompt states when `pool` is given.

    With a `block_size` also the hidden states that predict a response's tokens block_size,
    2 block_size, ... (from 0), 0 where it has ended by then.

    They are over the full vocabulary, or over `batch.allowed` where a guard has set it, and at
    `temperature`. No more than `logit_chunk_mb` MB of logits exist at a time. Entropies and
    certainties come from the same logits where they are asked for (`linear_statistics`).

    With more than one microbatch under gradient, all but the last are computed again in the
    backward pass, so that any loss over all N trajectories (group closed forms included) has the
    gradient of the whole batch at the memory of one microbatch. Of a model that is spread over
    ranks they are computed again after it, see `Deferred`.
    """
    passes = forward_passes(model, batch, tokens_per_microbatch)
    width = int(batch.response_lengths.max())
    of_pass = partial(
        _scores,
        model,
        pool=pool,
        temperature=temperature,
        logit_chunk_mb=logit_chunk_mb,
        entropy_temperature=entropy_temperature,
        certainty=certainty,
        blocks=None if block_size is None else Blocks.of(batch, block_size),
    )
    score = partial(in_one_pass, model, of_pass)
    pieces: list[Any] = []
    states: list[Any] = []
    blocks: list[Any] = []
    deferred: list[Deferred] = []
    for part in passes:
        # backward begins with the last: its activations may stay, they are gone before the others'
        if not torch.is_grad_enabled() or part is passes[-1]:
            state, after_blocks, *ragged = score(part)
        elif is_sharded(model):
            deferred.append(later := Deferred.of(partial(score, part)))
            state, after_blocks, *ragged = later.outputs
        else:
            state, after_blocks, *ragged = checkpoint(
                score,
                part,
                use_reentrant=False,
                preserve_rng_state=False,  # it draws nothing
            )
        if not len(part.rows):
            continue
        lengths = batch.response_lengths[part.rows]
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        pieces.append(
            [
                values.new_zeros(len(lengths), width).masked_scatter(mask, values)
                for values in ragged
                if values is not None
            ]
        )
        states.append(state)
        blocks.append(after_blocks)
        if on_progress is not None:
            on_progress(len(lengths))
    back = torch.argsort(torch.cat([part.rows for part in passes]))  # to the batch's order
    log_prob, *others = (torch.cat(values)[back] for values in zip(*pieces, strict=True))
    entropy = others.pop(0) if entropy_temperature is not None else None
    found = others.pop(0) if certainty else None
    pooled = None if pool is None else torch.cat(states)[back]
    between = None if block_size is None else torch.cat(blocks)[back]
    return Scores(log_prob, pooled, entropy, found, between, tuple(deferred))


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
    guarded = partial(_guarded, model, min_p=min_p, logit_chunk_mb=logit_chunk_mb)
    found: dict[int, GuardedResponse] = {}
    for part in forward_passes(model, batch, tokens_per_microbatch):
        full, restricted, allowed = in_one_pass(model, guarded, part)
        if not len(part.rows):
            continue
        places = batch.response_lengths[part.rows].tolist()
        pieces = zip(
            full.split(places), restricted.split(places), allowed.split(places), strict=True
        )
        for row, (full_row, over_allowed, inside) in zip(part.rows.tolist(), pieces, strict=True):
            inside = inside.to(torch.device("cpu"))
            # copies: views would take all of the pass along to other ranks and into checkpoints
            found[row] = GuardedResponse(full_row.cpu().clone(), over_allowed.cpu().clone(), inside)
    return [found[row] for row in range(len(found))]


def _guarded(
    model: Any, part: ForwardPass, *, min_p: float, logit_chunk_mb: float
) -> tuple[Tensor, Tensor, AllowedTokens]:
    """Log-probs over everything and over what is allowed, (R,) each, and what is allowed."""
    hidden, targets, _ = part.states(model, None)
    output = OutputLayer.of(model)
    shape, dtype = LogitShape(output.scale, output.soft_cap, 1.0), compute_dtype(output.weight)
    chunks = []
    for chunk in row_chunks(len(hidden), output.rows_per_chunk(logit_chunk_mb)):
        logits = shape.logits(hidden[chunk], output.weight, output.bias, dtype)
        chunks.append(_guarded_chunk(logits, targets[chunk], min_p))
        del logits  # before the next chunk's
    fulls, restricteds, sets = zip(*chunks, strict=True)
    return torch.cat(fulls), torch.cat(restricteds), AllowedTokens.cat(sets)


def _guarded_chunk(
    logits: Tensor, targets: Tensor, min_p: float
) -> tuple[Tensor, Tensor, AllowedTokens]:
    """Log-probs over everything and over what is allowed, (rows,) each, and what is allowed."""
    allowed = allowed_tokens(logits, targets, min_p)
    full = -nn.functional.cross_entropy(logits, targets, reduction="none")
    return full, log_prob_over(logits, targets, allowed), allowed


def _scores(
    model: Any,
    part: ForwardPass,
    *,
    pool: Pool | None,
    temperature: float,
    logit_chunk_mb: float,
    entropy_temperature: float | None,
    certainty: bool,
    blocks: Blocks | None,
) -> tuple[Tensor | None, ...]:
    """Prompt states (n, h), states between blocks (n, K, h), log-probs of all response tokens in a
    row (R,), then entropies and certainties where they are asked for."""
    states, targets, prompt_state = part.states(model, pool)
    output = OutputLayer.of(model)
    found = linear_statistics(
        states,
        output.weight,
        targets,
        bias=output.bias,
        scale=output.scale,
        soft_cap=output.soft_cap,
        temperature=temperature,
        rows_per_chunk=output.rows_per_chunk(logit_chunk_mb),
        allowed=part.allowed,
        entropy_temperature=entropy_temperature,
        certainty=certainty,
    )
    asked = (found.log_prob, found.entropy, found.certainty)
    between = None if blocks is None else blocks.states(states, part.rows)
    return prompt_state, between, *(values for values in asked if values is not None)
