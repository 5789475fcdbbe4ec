"""Closed forms of log Z and log Z': the value at which a prompt's weighted residuals average 0.

With u the mismatch (the residual without log Z), the loss sum_i w_i (z + u_i)^2 of one prompt is
least at z = -sum_i w_i u_i / sum_i w_i; what remains is the weighted variance of u within the
prompt (VarGrad). Pure functions of whole prompt groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerflow_lit.objectives.inputs import ObjectiveError


def group_sum(x: Tensor, prompt_index: Tensor) -> Tensor:
    """Sum of x over each row's prompt group, (N,) -> (N,)."""
    _, group = torch.unique(prompt_index, return_inverse=True)
    sums = x.new_zeros(int(group.max()) + 1).index_add(0, group, x)
    return sums[group]


def group_size(prompt_index: Tensor) -> Tensor:
    """Number of rollouts of each row's prompt, (N,) -> (N,) long."""
    return group_sum(torch.ones_like(prompt_index), prompt_index)


def group_mean(x: Tensor, prompt_index: Tensor) -> Tensor:
    """Mean of x over each row's prompt group, (N,) -> (N,)."""
    return group_sum(x, prompt_index) / group_size(prompt_index)


def leave_one_out_mean(x: Tensor, prompt_index: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean over the *other* rollouts of each row's prompt, (N,) -> (N,).

    Raises:
        ObjectiveError: a prompt has a single rollout.
    """
    if bool((group_size(prompt_index) < 2).any()):
        raise ObjectiveError(
            "a prompt has a single rollout, so it has no others to average over: "
            "set rollout.samples_per_prompt to 2 or more"
        )
    weight = torch.ones_like(x) if weight is None else weight
    others = group_sum(weight, prompt_index) - weight
    return (group_sum(weight * x, prompt_index) - weight * x) / others


def group_log_z(mismatch: Tensor, weight: Tensor, prompt_index: Tensor) -> Tensor:
    """Minimiser of each prompt's weighted squared residual, (N,) -> (N,), detached.

    dLoss/dz = 0 there, so detaching it leaves the gradient as it is.
    """
    mismatch = mismatch.detach()
    return -group_sum(weight * mismatch, prompt_index) / group_sum(weight, prompt_index)


def leave_one_out_log_z(mismatch: Tensor, weight: Tensor, prompt_index: Tensor) -> Tensor:
    """The same from the other rollouts of the prompt only (unbiased), (N,) -> (N,), detached."""
    return -leave_one_out_mean(mismatch.detach(), prompt_index, weight)
