"""The price of a token: lambda, at which responses have the mean length that was chosen.

Among all distributions with a given mean length, the one nearest in KL to an unnormalised target
p~ is p~(y) exp(-lambda |y|) / Z (arXiv 2603.18363, Prop. 3.2). There lambda is log Z', Z is 1 and
the length follows; here the length is chosen, and lambda and Z follow. E|y| falls as lambda grows,
with slope -Var|y|, so that each length between the shortest and the longest has one lambda.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from powerflow_lit.objectives.inputs import LossInputs, ObjectiveError, lengths
from powerflow_lit.objectives.log_z import group_mean
from powerflow_lit.objectives.weights import ImportanceWeight, Weights

EXACT = 1e-12  # of the target, the miss at which the root counts as found
STEPS = 200  # Newton's or halvings of the bracket; some 60 are needed at the most


def tilted_length(log_weight: Tensor, length: Tensor, price: float) -> tuple[float, float]:
    """Mean (tokens) and variance (tokens squared) of |y| under weights exp(log_weight - price |y|).

    Args:
        log_weight: (N,) nats, of any common offset; -inf is no weight.
        length: (N,) tokens.
    """
    length = length.double()
    share = (log_weight.double() - price * length).softmax(0)
    mean = (share * length).sum()
    return float(mean), float((share * (length - mean) ** 2).sum())


def solve_length_price(log_weight: Tensor, length: Tensor, *, target: float) -> float:
    """lambda, nats per token, at which |y| has mean `target` under exp(log_weight - lambda |y|).

    Newton's method in float64, kept inside a bracket of the root.

    Args:
        log_weight: (N,) nats, of any common offset; -inf is no weight.
        length: (N,) tokens.
        target: tokens.

    Raises:
        ObjectiveError: no lambda yields it, since it is not between the shortest and the longest.
    """
    length = length.double()
    present = length[log_weight > -torch.inf]
    least, most = float(present.min()), float(present.max())
    if not least < target < most:
        raise ObjectiveError(
            f"a mean length of {target:g} tokens cannot be had: responses have {least:g} to "
            f"{most:g}; choose one strictly between"
        )
    low, high = -1.0, 1.0
    while tilted_length(log_weight, length, low)[0] < target:
        low *= 2
    while tilted_length(log_weight, length, high)[0] > target:
        high *= 2
    price = 0.5 * (low + high)
    for _ in range(STEPS):
        mean, variance = tilted_length(log_weight, length, price)
        if abs(mean - target) <= EXACT * target:
            break
        low, high = (price, high) if mean > target else (low, price)
        price = price + (mean - target) / variance if variance > 0 else low
        if not low < price < high:
            price = 0.5 * (low + high)
    return price


@dataclass(frozen=True)
class LengthFit:
    """What rollouts say about length, within the groups of their prompts."""

    covariance: float  # of residual and |y|, weighted, nats x tokens
    spread: float  # of |y|, weighted, tokens squared
    variance: float  # of |y| as sampled, tokens squared

    @property
    def lead(self) -> float:
        """By how much the price lies above the one that the policy has answered, nats per token; 0
        where all rollouts of a prompt are as long, which tells nothing."""
        return self.covariance / self.spread if self.spread > 0 else 0.0


def length_fit(mismatch: Tensor, weight: Tensor, length: Tensor, prompt_index: Tensor) -> LengthFit:
    """How residual and |y| vary together over the rollouts of a prompt, pooled over prompts.

    A policy that has answered a price lambda' is at p~ exp(-lambda' |y|): its residual grows with
    |y| by price - lambda' for each token. Elsewhere the slope is that of least squares with the
    weights of the loss, taken off which the loss moves the mean length no more: its gradient in a
    table's log-probs is weight * residual. log Z drops out, being one per prompt.

    Args:
        mismatch: (N,) nats, residuals without log Z, price included; of the policy that sampled.
        weight: (N,) of the loss, such as 1 / |y|^2.
        length: (N,) tokens.
        prompt_index: (N,) equal for rollouts of one prompt.
    """
    length, mismatch, weight = length.double(), mismatch.double(), weight.double()

    def apart(x: Tensor) -> Tensor:
        return x - group_mean(weight * x, prompt_index) / group_mean(weight, prompt_index)

    share = weight / weight.sum()
    plain = length - group_mean(length, prompt_index)
    free = max(len(length) - len(prompt_index.unique()), 1)  # degrees of freedom
    return LengthFit(
        covariance=float((share * apart(length) * apart(mismatch)).sum()),
        spread=float((share * apart(length) ** 2).sum()),
        variance=float((plain**2).sum()) / free,
    )


@dataclass(frozen=True)
class PerToken:
    """An importance weight divided by |y|^2: a balance loss then squares its residual per token.

    The fixed point is the same as without; long responses count as much as short ones, as they do
    in LA-TB. Closed forms of log Z weigh with it too, and so do the `is_weight` metrics.
    """

    weight: ImportanceWeight

    @property
    def is_used(self) -> bool:
        """Whether behaviour log-probs matter."""
        return self.weight.is_used

    @torch.no_grad()
    def __call__(self, inputs: LossInputs) -> Weights:
        weights = self.weight(inputs)
        return replace(weights, value=weights.value / lengths(inputs.mask).to(weights.value) ** 2)
