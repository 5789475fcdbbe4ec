"""Policy-gradient twins of the balance objectives: KL-regularised rewards with alpha = 1 + 1/beta.

maximise E[r] - beta KL(pi || p_base), whose optimum is p_base * exp(r / beta). With r = B it is
p_base^alpha (RL-traj), with r = b = B/|y| it is p_base * exp(b / beta) (RL-token). These optima
are exact only for the defaults (KL in the reward, leave-one-out baseline, sequence sum).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from powerflow_lit.objectives.balance import sums, trajectory_metrics
from powerflow_lit.objectives.inputs import (
    LossInputs,
    LossOutput,
    ObjectiveError,
    check_alpha,
    checked,
    masked_sum,
)
from powerflow_lit.objectives.log_z import group_mean, leave_one_out_mean
from powerflow_lit.objectives.weights import ImportanceWeight

Energy = Literal["traj", "token"]
Kl = Literal["in_reward", "k3_loss"]
Advantage = Literal["rloo", "group", "grpo"]
Reduction = Literal["sequence_sum", "token_mean"]


def rl_traj(
    inputs: LossInputs,
    *,
    alpha: float,
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
    return _policy_gradient(inputs, reward, beta, kl, advantage, reduction, weight)


def rl_token(
    inputs: LossInputs,
    *,
    alpha: float,
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
    return _policy_gradient(inputs, reward, beta, kl, advantage, reduction, weight)


def _policy_gradient(
    inputs: LossInputs,
    reward: Tensor,
    beta: float,
    kl: Kl,
    advantage: Advantage,
    reduction: Reduction,
    weight: ImportanceWeight,
) -> LossOutput:
    """-mean(w A S), A from the reward less its baseline; the KL inside the reward or a k3 loss."""
    for value, options in ((kl, Kl), (advantage, Advantage), (reduction, Reduction)):
        if value not in get_args(options):
            raise ObjectiveError(f"'{value}' is none of {get_args(options)}")
    S, B, L = sums(inputs)
    if kl == "in_reward":
        reward = reward - beta * (S - B)
    reward = reward.detach()  # (N,)
    weights = weight(inputs)
    log_prob = S if reduction == "sequence_sum" else S / L
    loss = -(weights.value * _advantage(reward, inputs.prompt_index, advantage) * log_prob).mean()
    if kl == "k3_loss":
        penalty = _k3(inputs)  # (N,)
        penalty = penalty if reduction == "sequence_sum" else penalty / L
        loss = loss + beta * (weights.value * penalty).mean()
    residual = reward - group_mean(reward, inputs.prompt_index)
    return LossOutput(loss, trajectory_metrics(inputs, residual, weights), residual)


def _advantage(reward: Tensor, prompt_index: Tensor, kind: Advantage) -> Tensor:
    if kind == "rloo":
        return reward - leave_one_out_mean(reward, prompt_index)
    centred = reward - group_mean(reward, prompt_index)
    if kind == "group":
        return centred
    return centred / (group_mean(centred.square(), prompt_index).sqrt() + 1e-6)


def _k3(inputs: LossInputs) -> Tensor:
    """Sum over tokens of exp(x) - 1 - x with x = log p_base - log pi_theta, (N,), nats."""
    x = inputs.log_p_base - inputs.log_pf
    return masked_sum(torch.expm1(x) - x, inputs.mask)


def _beta(alpha: float, name: str) -> float:
    check_alpha(alpha, above=1.0, why=f"{name} (beta = 1/(alpha-1))")
    return 1.0 / (alpha - 1.0)


@dataclass(frozen=True)
class PolicyGradientObjective:
    """An RL strategy assembled from configuration; it has no log Z."""

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

    def __call__(self, inputs: LossInputs, *, alpha: float) -> LossOutput:
        objective = {"traj": rl_traj, "token": rl_token}[self.energy]
        return objective(
            inputs,
            alpha=alpha,
            kl=self.kl,
            advantage=self.advantage,
            reduction=self.reduction,
            weight=self.weight,
        )
