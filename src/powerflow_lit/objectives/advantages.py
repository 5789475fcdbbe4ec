"""Advantages: a reward less what the other rollouts of its prompt got. Every RL strategy's own."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from powerflow_lit.objectives.inputs import ObjectiveError
from powerflow_lit.objectives.log_z import group_mean, leave_one_out_mean

Advantage = Literal["rloo", "group", "grpo"]


def advantages(reward: Tensor, prompt_index: Tensor, kind: Advantage) -> Tensor:
    """(N,) rewards to (N,) advantages within each prompt's group.

    `rloo`: less the mean of the prompt's other rollouts (unbiased). `group`: less the group's mean
    (Dr. GRPO). `grpo`: that, divided by the group's standard deviation + 1e-6 (DeepSeekMath; with
    G - 1 in the denominator, as verl and TRL have it).

    Raises:
        ObjectiveError: another kind; a prompt with a single rollout, for `rloo`.
    """
    if kind not in get_args(Advantage):
        raise ObjectiveError(f"advantage '{kind}' is none of {get_args(Advantage)}")
    if kind == "rloo":
        return reward - leave_one_out_mean(reward, prompt_index)
    centred = centre(reward, prompt_index)
    if kind == "group":
        return centred
    _, group, sizes = prompt_index.unique(return_inverse=True, return_counts=True)
    size = sizes[group]
    variance = group_mean(centred.square(), prompt_index) * size / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-6)


def centre(reward: Tensor, prompt_index: Tensor) -> Tensor:
    """Rewards less their group's mean, (N,)."""
    centred = reward - group_mean(reward, prompt_index)
    # of equal rewards one rounding is left, which `grpo` would blow up; the second pass removes it
    return centred - group_mean(centred, prompt_index)
