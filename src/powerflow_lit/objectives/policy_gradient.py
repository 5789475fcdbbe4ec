"""Policy gradients: one path from an advantage to a loss, for the RL twins and for RL with rewards.

The twins of the balance objectives maximise E[r] - beta KL(pi || p_base), alpha = 1 + 1/beta, whose
optimum is p_base * exp(r / beta). With r = B it is p_base^alpha (RL-traj), with r = b = B/|y| it is
p_base * exp(b / beta) (RL-token). These optima are exact only for the defaults (KL in the reward,
leave-one-out baseline, sequence sum).

The reward strategies (GRPO and what took its loss: Intuitor, EMPO, TTRL) differ in their reward
alone; `RewardObjective` is all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from powerflow_lit.objectives.advantages import Advantage, advantages, centre
from powerflow_lit.objectives.balance import sums, trajectory_metrics
from powerflow_lit.objectives.inputs import (
    Alpha,
    LossInputs,
    LossOutput,
    ObjectiveError,
    check_alpha,
    checked,
    lengths,
    masked_sum,
    reward_of,
)
from powerflow_lit.objectives.weights import ImportanceWeight, PpoClip, Weights

Energy = Literal["traj", "token"]
Kl = Literal["in_reward", "k3_loss"]
Reduction = Literal["sequence_sum", "token_mean", "all_tokens", "constant_length"]


# --- from advantages to a loss -------------------------------------------------------------------


def reduced(x: Tensor, mask: Tensor, reduction: Reduction, longest: int | None = None) -> Tensor:
    """A number per token to one per trajectory, (N, T) -> (N,), whose mean is the loss.

    `sequence_sum`: the sum. `token_mean`: the response's mean (GRPO). `all_tokens`: over the mean
    length of the update, so that every token counts the same (DAPO). `constant_length`: over
    `longest` tokens (Dr. GRPO).

    Raises:
        ObjectiveError: another reduction, or `constant_length` without a length.
    """
    if reduction not in get_args(Reduction):
        raise ObjectiveError(f"reduction '{reduction}' is none of {get_args(Reduction)}")
    total, length = masked_sum(x, mask), lengths(mask).to(x.dtype)
    if reduction == "token_mean":
        return total / length
    if reduction == "all_tokens":
        return total / length.mean()
    if reduction == "constant_length":
        if longest is None or longest < 1:
            raise ObjectiveError(
                f"reduction 'constant_length' with longest={longest}: give it the tokens to divide "
                "by, 1 or more (rollout.max_new_tokens)"
            )
        return total / longest
    return total


def surrogate_loss(
    inputs: LossInputs,
    advantage: Tensor,
    *,
    surrogate: ImportanceWeight | PpoClip,
    reduction: Reduction,
    kl: float,
    longest: int | None = None,
) -> tuple[Tensor, Weights]:
    """Minus the mean gain of checked inputs plus `kl` times k3, and the weights to log.

    A token's gain is w A log pi_theta with a detached weight w, or PPO's min(rho A, clip(rho) A).

    Args:
        advantage: (N,), data.
        kl: coefficient of the KL to the base, estimated per token by k3.
    """
    if isinstance(surrogate, PpoClip):
        gain, weights = surrogate(inputs, advantage)
        scale = torch.ones_like(advantage)
    else:
        weights = surrogate(inputs)
        scale = weights.value
        gain = (scale * advantage)[:, None] * inputs.log_pf
    if kl:
        gain = gain - kl * scale[:, None] * _k3(inputs)
    return -reduced(gain, inputs.mask, reduction, longest).mean(), weights


def _k3(inputs: LossInputs) -> Tensor:
    """exp(x) - 1 - x with x = log p_base - log pi_theta, (N, T), nats."""
    x = inputs.log_p_base - inputs.log_pf
    return torch.expm1(x) - x


# --- RL with a reward ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardObjective:
    """RL on the rewards of the rollouts: GRPO and its descendants. alpha is not used.

    psi is added to the reward of a response without the format.

    Attributes:
        advantage, reduction: see `advantages` and `reduced`.
        surrogate: `PpoClip`, or an `ImportanceWeight` for plain REINFORCE.
        kl: coefficient of a KL to the base (k3, per token); 0 for none.
        longest: tokens that `constant_length` divides by.
    """

    advantage: Advantage
    reduction: Reduction
    surrogate: ImportanceWeight | PpoClip
    kl: float
    longest: int | None
    uses_log_z: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.kl < float("inf"):
            raise ObjectiveError(f"kl={self.kl}: a coefficient of 0 or more")

    @property
    def uses_log_p_old(self) -> bool:
        """Whether behaviour log-probs change the loss."""
        return self.surrogate.is_used

    def __call__(self, inputs: LossInputs, *, alpha: Alpha) -> LossOutput:
        """
        Raises:
            ObjectiveError: no reward.
            NonFiniteInputError: NaN or infinity among rewards or inside the mask.
        """
        inputs = checked(inputs)
        reward = reward_of(inputs) + inputs.format_penalty
        loss, weights = surrogate_loss(
            inputs,
            advantages(reward, inputs.prompt_index, self.advantage),
            surrogate=self.surrogate,
            reduction=self.reduction,
            kl=self.kl,
            longest=self.longest,
        )
        residual = centre(reward, inputs.prompt_index)
        return LossOutput(loss, trajectory_metrics(inputs, residual, weights), residual)


# --- the RL twins of the balance objectives ------------------------------------------------------


def rl_traj(
    inputs: LossInputs,
    *,
    alpha: Alpha,
    kl: Kl,
    advantage: Advantage,
    reduction: Reduction,
    weight: ImportanceWeight,
) -> LossOutput:
    """RL on the trajectory log-prob, r = B + |y| psi alpha / (alpha - 1); optimum p_base^alpha.

    Raises:
        ObjectiveError: alpha <= 1 (beta = 1/(alpha - 1) would not be positive), one rollout only.
    """
    inputs, beta = checked(inputs), _beta(alpha, "rl_traj")
    _, B, L = sums(inputs)
    reward = B + L * inputs.format_penalty * alpha / (alpha - 1)
    return _regularised(inputs, reward, beta, kl, advantage, reduction, weight)


def rl_token(
    inputs: LossInputs,
    *,
    alpha: Alpha,
    kl: Kl,
    advantage: Advantage,
    reduction: Reduction,
    weight: ImportanceWeight,
) -> LossOutput:
    """RL on the average token log-prob, r = b + psi; optimum p_base * exp(r (alpha - 1)).

    Raises:
        ObjectiveError: alpha <= 1, one rollout only.
    """
    inputs, beta = checked(inputs), _beta(alpha, "rl_token")
    _, B, L = sums(inputs)
    reward = B / L + inputs.format_penalty
    return _regularised(inputs, reward, beta, kl, advantage, reduction, weight)


def _regularised(
    inputs: LossInputs,
    reward: Tensor,
    beta: float,
    kl: Kl,
    advantage: Advantage,
    reduction: Reduction,
    weight: ImportanceWeight,
) -> LossOutput:
    """The policy gradient of a reward less beta times the KL, inside the reward or as a loss."""
    if kl not in get_args(Kl):
        raise ObjectiveError(f"'{kl}' is none of {get_args(Kl)}")
    S, B, _ = sums(inputs)
    if kl == "in_reward":
        reward = reward - beta * (S - B)
    reward = reward.detach()  # (N,)
    loss, weights = surrogate_loss(
        inputs,
        advantages(reward, inputs.prompt_index, advantage),
        surrogate=weight,
        reduction=reduction,
        kl=beta if kl == "k3_loss" else 0.0,
    )
    residual = centre(reward, inputs.prompt_index)
    return LossOutput(loss, trajectory_metrics(inputs, residual, weights), residual)


def _beta(alpha: Alpha, name: str) -> float:
    if isinstance(alpha, Tensor):
        raise ObjectiveError(f"{name} takes one alpha for all prompts: set alpha_schedule.scope")
    check_alpha(alpha, above=1.0, why=f"{name} (beta = 1/(alpha-1))")
    return 1.0 / (alpha - 1.0)


@dataclass(frozen=True)
class PolicyGradientObjective:
    """An RL twin assembled from configuration; it has no log Z."""

    energy: Energy
    kl: Kl
    advantage: Advantage
    reduction: Reduction
    weight: ImportanceWeight
    uses_log_z: bool = False

    @property
    def uses_log_p_old(self) -> bool:
        """Whether behaviour log-probs change the loss."""
        return self.weight.is_used

    def __post_init__(self) -> None:
        if self.energy not in get_args(Energy):
            raise ObjectiveError(f"energy '{self.energy}' is none of {get_args(Energy)}")

    def __call__(self, inputs: LossInputs, *, alpha: Alpha) -> LossOutput:
        objective = {"traj": rl_traj, "token": rl_token}[self.energy]
        return objective(
            inputs,
            alpha=alpha,
            kl=self.kl,
            advantage=self.advantage,
            reduction=self.reduction,
            weight=self.weight,
        )
