"""AdamW in one kernel for all parameters, where torch has one and nothing speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import get_constant_schedule_with_warmup

FUSED_ON = ("cpu", "cuda")  # devices on which torch's fused AdamW was measured, or is its advice


def adamw(
    groups: Sequence[Mapping[str, Any]],
    *,
    betas: tuple[float, float],
    fused: bool | None,
    scaled_loss: bool,
) -> torch.optim.AdamW:
    """AdamW over parameter groups; fused or not, a step is the same to rounding.

    Args:
        fused: one kernel for all parameters; None: on `FUSED_ON`, unless the loss is scaled.
        scaled_loss: a gradient scaler is at work (float16). A fused optimizer undoes its scaling
            within the step, that is after the gradients were clipped.

    Raises:
        ValueError: `fused` with a scaled loss.
    """
    if fused and scaled_loss:
        raise ValueError("a fused optimizer would clip gradients that are still scaled")
    if fused is None:
        devices = {p.device.type for group in groups for p in group["params"]}
        fused = not scaled_loss and devices <= set(FUSED_ON)
    made = [dict(group) for group in groups]
    # not False: None leaves the choice among the others to torch
    return torch.optim.AdamW(made, betas=betas, fused=fused or None)


def warmed_up(
    optimizer: torch.optim.Optimizer, *, hold: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of AdamW's groups: the policy's, and the head's where there is one.

    Args:
        hold: updates for which the first group's learning rate is 0, while the head learns.
        warmup: updates after that over which it rises to its value; the second's has it at once.
    """
    rising = get_constant_schedule_with_warmup(optimizer, warmup).lr_lambdas[0]
    lambdas = [lambda step: 0.0 if step < hold else rising(step - hold + 1), lambda step: 1.0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas[: len(optimizer.param_groups)])
