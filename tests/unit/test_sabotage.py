"""The reference check has teeth: it passes a faithful copy of PowerFlow and fails every mutant.

The mutants go through `assert_loss_and_gradient`, the very function that the real objectives pass
in `test_objectives.py`, on the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from powerflow_lit.objectives import LossInputs, LossOutput, powerflow
from tests.reference import (
    FILLERS,
    Filler,
    Objective,
    assert_loss_and_gradient,
    powerflow_reference,
    random_batch,
)

EPSILON = 0.2
ALPHAS = (0.5, 2.0, 4.0)
SABOTAGES = {
    "the sign of log_p_base is flipped": "base_sign",
    "the mask is dropped": "no_mask",
    "the padded width stands for the length": "width_as_length",
    "the weight is not clipped": "unclipped",
    "the weight is not detached": "attached",
    "the weight is clipped but the raw one multiplies": "clip_unused",
    "the weight is clipped from above only": "upper_clip_only",
    "psi is divided by the length again": "psi_per_length",
    "alpha does not reach psi": "psi_without_alpha",
    "the sum is not averaged over the length": "not_averaged",
    "log_z is left out": "no_log_z",
    "the loss is summed over trajectories": "summed",
}


def copy_of_powerflow(
    inputs: LossInputs, *, alpha: float, epsilon: float, sabotage: str | None
) -> LossOutput:
    """eq. 9 and 10 once more, with one fault if asked for."""
    mask = torch.ones_like(inputs.mask) if sabotage == "no_mask" else inputs.mask

    def total(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(1)

    lengths = mask.sum(1).double()
    if sabotage == "width_as_length":
        lengths = torch.full_like(lengths, mask.shape[1])
    base = total(inputs.log_p_base) * (-1.0 if sabotage == "base_sign" else 1.0)
    psi = inputs.format_penalty / (lengths if sabotage == "psi_per_length" else 1.0)
    divisor = torch.ones_like(lengths) if sabotage == "not_averaged" else lengths
    target = alpha * (base / divisor + psi)
    if sabotage == "psi_without_alpha":
        target = alpha * base / divisor + psi
    residual = total(inputs.log_pf) / divisor - target
    if sabotage != "no_log_z":
        residual = residual + inputs.log_z

    ratio = (total(inputs.log_pf) - total(inputs.log_p_old)).exp()
    if sabotage != "attached":
        ratio = ratio.detach()
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + epsilon)
    if sabotage == "upper_clip_only":
        clipped = ratio.clamp(max=1.0 + epsilon)
    weight = ratio if sabotage in ("unclipped", "clip_unused") else clipped
    square = weight * residual**2
    return LossOutput(square.sum() if sabotage == "summed" else square.mean(), {}, residual)


def check(objective: Callable[..., LossOutput], filler: Filler) -> None:
    """What test_objectives.py asks of PowerFlow."""
    for alpha in ALPHAS:
        applied: Objective = partial(objective, alpha=alpha, epsilon=EPSILON)
        for seed, with_psi in ((1, True), (2, True), (3, False)):
            assert_loss_and_gradient(
                applied,
                powerflow_reference(alpha, EPSILON),
                random_batch(seed, with_psi=with_psi),
                filler=filler,
            )


@pytest.mark.parametrize("filler", FILLERS)
def test_the_real_objective_passes_the_check(filler: Filler) -> None:
    check(powerflow, filler)


@pytest.mark.parametrize("filler", FILLERS)
def test_the_copy_without_sabotage_passes_the_check(filler: Filler) -> None:
    check(partial(copy_of_powerflow, sabotage=None), filler)


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("fault", SABOTAGES)
def test_every_sabotaged_copy_fails_the_check(fault: str, filler: Filler) -> None:
    with pytest.raises(AssertionError):
        check(partial(copy_of_powerflow, sabotage=SABOTAGES[fault]), filler)


def test_an_attached_weight_is_seen_by_its_gradient_alone() -> None:
    """Its loss is right, so a check of losses would let it pass."""
    batch = random_batch(1)
    reference = powerflow_reference(2.0, EPSILON)
    attached = partial(copy_of_powerflow, alpha=2.0, epsilon=EPSILON, sabotage="attached")

    def without_gradient(inputs: LossInputs) -> LossOutput:
        """The attached copy's loss with the true objective's gradient."""
        true = powerflow(inputs, alpha=2.0, epsilon=EPSILON)
        value = attached(inputs).loss.detach()
        return LossOutput(true.loss + (value - true.loss.detach()), {}, true.residual)

    assert_loss_and_gradient(without_gradient, reference, batch, filler="noise")
    with pytest.raises(AssertionError):
        assert_loss_and_gradient(attached, reference, batch, filler="noise")
