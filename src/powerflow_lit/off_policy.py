"""Updates of which not every trajectory is the policy's own, as it is now."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from powerflow_lit.objectives import LossInputs
from powerflow_lit.objectives.balance import UNWEIGHTED, trajectory_metrics
from powerflow_lit.objectives.inputs import checked
from powerflow_lit.types import TrajectoryBatch

# of the raw ratios of policy to behaviour, known without its log-probs only where they are all 1
RAW_RATIOS = {"ess", "is_log_ratio_q05", "is_log_ratio_q50", "is_log_ratio_q95"}
# what an update's metrics say of the policy, and so of its own samples alone
OF_THE_POLICY = RAW_RATIOS | {
    "entropy", "kl_base", "inversion_rate",
    "is_weight_mean", "is_weight_min", "is_weight_max", "is_clip_frac",
}  # fmt: skip


def ratios_unknown(batch: TrajectoryBatch, version: int) -> bool:
    """Whether some trajectory is older than the policy, and nobody kept its behaviour log-probs."""
    is_older = batch.policy_version != version
    return bool((is_older & batch.log_p_old.isnan().any(1)).any())


@torch.no_grad()
def policy_metrics(
    objective: Any, inputs: LossInputs, residual: Tensor, from_base: Tensor
) -> dict[str, Tensor]:
    """The metrics that are of the policy's own samples alone, and the mean weight of the base's.

    Args:
        residual: (N,).
        from_base: (N,) bool.
    """
    inputs, weight = checked(inputs), getattr(objective, "weight", UNWEIGHTED)
    own = _rows(inputs, ~from_base)
    found = trajectory_metrics(own, residual[~from_base], weight(own))
    of_base = weight(_rows(inputs, from_base)).value.mean()
    return {"is_weight_base": of_base, **{n: x for n, x in found.items() if n in OF_THE_POLICY}}


def _rows(inputs: LossInputs, chosen: Tensor) -> LossInputs:
    given = {f.name: x for f in fields(inputs) if (x := getattr(inputs, f.name)) is not None}
    return replace(inputs, **{name: x[chosen] for name, x in given.items()})
