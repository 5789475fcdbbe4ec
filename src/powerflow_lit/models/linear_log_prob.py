"""Log-probs, entropies and certainties of tokens from hidden states, without [tokens x vocabulary].

All come from one pass over chunks of logits, which the backward pass computes anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from powerflow_lit.types import AllowedTokens

# rows of the output layer's gradient that one product yields where it cannot be added in place
VOCABULARY_BLOCK = 16_384


@dataclass(frozen=True)
class LogitShape:
    """From the output layer's product W h + b to logits, in float32 or better.

    logits = cap * tanh(scale * product / cap) / temperature, without the tanh where cap is None.
    """

    scale: float
    soft_cap: float | None
    temperature: float

    def logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """(rows, h) -> (rows, V), without gradient; the product is in `dtype`."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            product = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
            product = product.to(_wide(dtype))
            if self.scale != 1:
                product.mul_(self.scale)
            if self.soft_cap is not None:
                product.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
            return product if self.temperature == 1 else product.div_(self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d product at given logits: (rows, V), or one number."""
        constant = self.scale / self.temperature
        if self.soft_cap is None:
            return constant
        return (logits * (self.temperature / self.soft_cap)).square_().neg_().add_(1).mul_(constant)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    temperature: float,
    rows_per_chunk: int,
    allowed: AllowedTokens | None = None,
) -> Tensor:
    """Log-softmax of the output layer's logits (see `LogitShape`) at each row's target.

    Values and gradients are those of the log-softmax over the whole logits, up to rounding, but no
    more than `rows_per_chunk` rows of logits exist at a time; the backward pass computes them
    anew. Products are in the dtype of the weight, or of autocast where that is on. The softmax is
    in float32, and so are the sums that make up the gradients of weight and bias: in bfloat16 a
    sum over many chunks would lose the small ones. All is in float64 if the weight is.

    Args:
        hidden: (M, h); gradient flows if it is required.
        weight: (V, h) of the output layer; where it is frozen no gradient of it is computed.
        targets: (M,) long token ids.
        bias: (V,) of the output layer, or None; as the weight.
        scale: factor of the product; 1 in most architectures.
        soft_cap: bound of the logits' size, or None.
        temperature: what the logits are divided by, above 0.
        allowed: what a guard allows at each of the M places, the target included: the softmax is
            over those tokens alone, and no gradient reaches the others. None is everything.

    Returns:
        (M,) float32, nats.
    """
    return linear_statistics(
        hidden,
        weight,
        targets,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        temperature=temperature,
        rows_per_chunk=rows_per_chunk,
        allowed=allowed,
    ).log_prob


@dataclass(frozen=True)
class TokenStatistics:
    """What one pass over M places yields, (M,) float32 nats each; None where not asked for."""

    log_prob: Tensor
    entropy: Tensor | None  # of the next token, over the full vocabulary
    certainty: Tensor | None  # log-sum-exp less mean of the logits: KL(uniform || p) + log V


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    temperature: float,
    rows_per_chunk: int,
    allowed: AllowedTokens | None = None,
    entropy_temperature: float | None = None,
    certainty: bool = False,
) -> TokenStatistics:
    """`linear_log_prob` with further numbers of the same logits, as differentiable as it is.

    Args:
        entropy_temperature: the entropy of softmax(logits / this), where it is given.
        certainty: of the logits at `temperature`. Both are over the full vocabulary whatever a
            guard allows.
    """
    dtype = compute_dtype(weight)
    shape = LogitShape(scale, soft_cap, temperature)
    chunks = list(row_chunks(len(hidden), rows_per_chunk))
    sets = None if allowed is None else allowed.split([c.stop - c.start for c in chunks])
    extras: list[_Extra] = []
    if entropy_temperature is not None:
        extras.append(_Entropy(entropy_temperature / temperature))
    if certainty:
        extras.append(_Certainty())
    plan = _Plan(shape, dtype, chunks, sets, tuple(extras))
    log_prob, *found = _LinearStatistics.apply(hidden, weight, targets, bias, plan)
    entropy = found.pop(0) if entropy_temperature is not None else None
    return TokenStatistics(log_prob, entropy, found.pop(0) if certainty else None)


def row_chunks(rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows_per_chunk` rows that cover all rows."""
    for start in range(0, rows, rows_per_chunk):
        yield slice(start, min(start + rows_per_chunk, rows))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Of the output layer's products: autocast's where that is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@dataclass(frozen=True)
class _Entropy:
    """Entropy of softmax(logits / temperature)."""

    temperature: float

    def value(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, V) to the entropy and what the gradient needs beside it, (rows,) each."""
        scaled = logits / self.temperature
        normaliser = scaled.logsumexp(1)
        return torch.special.entr(scaled.sub_(normaliser[:, None]).exp_()).sum(1), normaliser

    def gradient(self, logits: Tensor, value: Tensor, normaliser: Tensor) -> Tensor:
        """d entropy / d logits, (rows, V): -p (log p + H) / temperature."""
        p = (logits / self.temperature).sub_(normaliser[:, None]).exp_()
        return torch.special.entr(p).sub_(p.mul_(value[:, None])).div_(self.temperature)


@dataclass(frozen=True)
class _Certainty:
    """Log-sum-exp of the logits less their mean."""

    def value(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        normaliser = logits.logsumexp(1)
        return normaliser - logits.mean(1), normaliser

    def gradient(self, logits: Tensor, value: Tensor, normaliser: Tensor) -> Tensor:
        return (logits - normaliser[:, None]).exp_().sub_(1 / logits.shape[1])


_Extra = _Entropy | _Certainty


@dataclass(frozen=True)
class _Plan:
    """All that is no tensor of the graph."""

    shape: LogitShape
    dtype: torch.dtype
    chunks: list[slice]
    allowed: list[AllowedTokens] | None
    extras: tuple[_Extra, ...]

    def logits(self, number: int, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.shape.logits(hidden[self.chunks[number]], weight, bias, self.dtype)

    def restrict(self, number: int, logits: Tensor) -> Tensor:
        """The chunk's logits, minus infinity in place where a token is not allowed."""
        if self.allowed is None:
            return logits
        ids, counts = self.allowed[number].ids.long(), self.allowed[number].counts.long()
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside[torch.arange(len(counts), device=ids.device).repeat_interleave(counts), ids] = False
        return logits.masked_fill_(outside, -torch.inf)


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, ...]:
        chosen = torch.empty(len(hidden), dtype=_wide(plan.dtype), device=hidden.device)
        normaliser = torch.empty_like(chosen)  # (M,) logsumexp
        values = [torch.empty_like(chosen) for _ in plan.extras]
        theirs = [torch.empty_like(chosen) for _ in plan.extras]  # normalisers
        cast = weight.to(plan.dtype)
        for number, rows in enumerate(plan.chunks):
            logits = plan.logits(number, hidden, cast, bias)
            for extra, value, other in zip(plan.extras, values, theirs, strict=True):
                value[rows], other[rows] = extra.value(logits)
            logits = plan.restrict(number, logits)
            chosen[rows] = logits.gather(1, targets[rows, None])[:, 0]
            top = logits.amax(1, keepdim=True)
            normaliser[rows] = logits.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
            del logits  # before the next chunk's
        ctx.save_for_backward(hidden, weight, targets, bias, normaliser, *values, *theirs)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # of what nobody used there is none to compute
        return (chosen - normaliser, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, normaliser, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        count = len(plan.extras)
        extras = zip(plan.extras, kept[:count], kept[count:], grads, strict=True)
        used = [(extra, value, other, of) for extra, value, other, of in extras if of is not None]
        if grad is None and not used:
            return (None,) * 5
        needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if needs_bias else None
        cast = weight.to(plan.dtype)
        for number, rows in enumerate(plan.chunks):
            logits = plan.logits(number, hidden, cast, bias)
            slope = plan.shape.slope(logits)
            parts = [
                extra.gradient(logits, value[rows], other[rows]).mul_(of[rows, None])
                for extra, value, other, of in used
            ]
            if grad is not None:
                logits = plan.restrict(number, logits)
                # d log_prob / d logits is onehot - softmax
                d_chosen = logits.sub_(normaliser[rows, None]).exp_().mul_(-grad[rows, None])
                parts.append(d_chosen.scatter_add_(1, targets[rows, None], grad[rows, None]))
                del d_chosen
            d_product = parts.pop()
            while parts:
                d_product.add_(parts.pop())
            d_product.mul_(slope)
            del logits, slope
            if d_bias is not None:
                d_bias += d_product.sum(0)
            d_product = d_product.to(plan.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_product @ cast
            if d_weight is not None:
                _add_product(d_weight, d_product.T, hidden[rows].to(plan.dtype))
            del d_product
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, None, d_bias, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, h) += left (V, rows) right (rows, h), without a second (V, h)."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for part in row_chunks(len(total), VOCABULARY_BLOCK):
        total[part] += left[part] @ right
