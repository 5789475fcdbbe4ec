"""AdamW in one kernel for all parameters, where torch has one and nothing speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
