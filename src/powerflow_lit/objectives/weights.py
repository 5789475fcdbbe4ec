"""Importance weights of off-policy trajectories (eq. 10 and its alternatives)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from powerflow_lit.objectives.inputs import (
    LossInputs,
    ObjectiveError,
    check_epsilon,
    lengths,
    masked_sum,
)

WeightKind = Literal["none", "seq_sum", "seq_geo", "token"]


@dataclass(frozen=True)
class Weights:
    """Detached importance weights and the raw ratios they came from."""

    value: Tensor  # (N,) what multiplies the loss of a trajectory
    log_ratio: Tensor  # (N,) raw log pi_theta(y) / pi_old(y) at the kind's scale, nats
    clipped: Tensor  # (N,) float  share of the trajectory's ratios that were clipped


@dataclass(frozen=True)
class ImportanceWeight:
    """How far off-policy a trajectory counts.

    Attributes:
        kind: `seq_sum` is eq. 10, w = clip(prod_t pi_theta/pi_old, 1-eps_low, 1+eps_high);
            `seq_geo` takes the geometric mean of the token ratios (GSPO); `token` the mean of
            clipped token ratios; `none` is 1.
        epsilon_low, epsilon_high: clip range; None leaves that side open (epsilon_high alone is
            truncated importance sampling).
    """

    kind: WeightKind
    epsilon_low: float | None
    epsilon_high: float | None

    def __post_init__(self) -> None:
        if self.kind not in get_args(WeightKind):
            raise ObjectiveError(f"weight kind '{self.kind}': choose one of {get_args(WeightKind)}")
        if self.epsilon_low is not None:
            check_epsilon(self.epsilon_low)
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise ObjectiveError(f"epsilon_high={self.epsilon_high} must be positive, or null")

    @property
    def is_used(self) -> bool:
        """Whether any weight differs from 1: only then do behaviour log-probs matter."""
        return self.kind != "none"

    @torch.no_grad()
    def __call__(self, inputs: LossInputs) -> Weights:
        log_ratio = (inputs.log_pf - inputs.log_p_old).detach()  # (N, T)
        summed = masked_sum(log_ratio, inputs.mask)  # (N,)
        length = lengths(inputs.mask).to(summed.dtype)
        if self.kind == "none":
            return Weights(torch.ones_like(summed), summed, torch.zeros_like(summed))
        if self.kind == "token":
            value, clipped = self._clip(log_ratio)
            mean = masked_sum(value, inputs.mask) / length
            share = masked_sum(clipped, inputs.mask) / length
            return Weights(mean, summed, share)
        raw = summed if self.kind == "seq_sum" else summed / length
        value, clipped = self._clip(raw)
        return Weights(value, raw, clipped)

    def _clip(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        # clipped as logarithms: exp of a summed ratio overflows long before it is clipped
        low = -math.inf if self.epsilon_low is None else math.log1p(-self.epsilon_low)
        high = math.inf if self.epsilon_high is None else math.log1p(self.epsilon_high)
        outside = (log_ratio < low) | (log_ratio > high)
        return log_ratio.clamp(low, high).exp(), outside.to(log_ratio.dtype)


@dataclass(frozen=True)
class PpoClip:
    """PPO's clipped surrogate of a policy gradient: min(rho A, clip(rho, 1-low, 1+high) A).

    Attributes:
        ratio: `token`, rho_t = pi_theta(y_t) / pi_old(y_t) (GRPO); `sequence`, the geometric mean
            of a response's token ratios for all of its tokens (GSPO).
        epsilon_low, epsilon_high: clip range.
    """

    ratio: Literal["token", "sequence"]
    epsilon_low: float
    epsilon_high: float

    def __post_init__(self) -> None:
        if self.ratio not in ("token", "sequence"):
            raise ObjectiveError(f"ratio '{self.ratio}': choose token or sequence")
        if self.epsilon_low is None or self.epsilon_high is None:  # as an importance weight may
            raise ObjectiveError("PPO's clip has two sides: give epsilon_low and epsilon_high")
        self._logged()

    @property
    def is_used(self) -> bool:
        """Behaviour log-probs always matter."""
        return True

    def __call__(self, inputs: LossInputs, advantage: Tensor) -> tuple[Tensor, Weights]:
        """The gain of each token, (N, T) with gradient, and the ratios to log.

        Args:
            inputs: checked ones.
            advantage: (N,), data.
        """
        log_ratio = inputs.log_pf - inputs.log_p_old  # 0 in the padding
        if self.ratio == "sequence":
            mean = masked_sum(log_ratio, inputs.mask) / lengths(inputs.mask)
            log_ratio = mean[:, None].expand_as(log_ratio)
        ratio, weight = log_ratio.exp(), advantage[:, None]
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return torch.minimum(ratio * weight, clipped * weight), self._logged()(inputs)

    def _logged(self) -> ImportanceWeight:
        """The same ratios, clipped, as the metrics know them."""
        kind: WeightKind = "token" if self.ratio == "token" else "seq_geo"
        return ImportanceWeight(kind, self.epsilon_low, self.epsilon_high)


def weight_metrics(weights: Weights) -> dict[str, Tensor]:
    """Applied weights, raw log-ratio quantiles (nats), clip fraction, effective sample size.

    `ess` is that of the raw ratios, (sum r)^2 / (N sum r^2), in (0, 1].
    """
    log_ratio, value = weights.log_ratio, weights.value
    quantiles = torch.quantile(log_ratio, log_ratio.new_tensor([0.05, 0.5, 0.95]))
    return {
        "is_weight_mean": value.mean(),
        "is_weight_min": value.min(),
        "is_weight_max": value.max(),
        "is_clip_frac": weights.clipped.mean(),
        "is_log_ratio_q05": quantiles[0],
        "is_log_ratio_q50": quantiles[1],
        "is_log_ratio_q95": quantiles[2],
        "ess": effective_share(log_ratio),
    }


def effective_share(log_ratio: Tensor) -> Tensor:
    """Effective sample size of weights exp(log_ratio) over their number, (N,) nats -> (), (0, 1].

    (sum r)^2 / (N sum r^2): 1 where all weights are equal, 1/N where one outweighs the others.
    """
    log_n = math.log(log_ratio.shape[0])
    return (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0) - log_n).exp()


def outlived(log_ratio: Mapping[int, Tensor], min_ess: float) -> list[int]:
    """The refills to part with so that what is left has an effective share of `min_ess`.

    The oldest goes first and whole: which of its trajectories go must not depend on their weights,
    or what is left would be a biased sample. The newest always stays.

    Args:
        log_ratio: by refill, (N_r,) summed log pi_theta(y) / pi_old(y), nats.
    """
    kept = sorted(log_ratio)
    while len(kept) > 1 and effective_share(torch.cat([log_ratio[r] for r in kept])) < min_ess:
        kept.pop(0)
    return sorted(log_ratio.keys() - kept)
