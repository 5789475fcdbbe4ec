"""Which stale refills a run still trains on (`buffer.min_ess`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from powerflow_lit import ranks
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.objectives.weights import effective_share, outlived
from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.scoring import Scorer
from powerflow_lit.trajectories import own_samples
from powerflow_lit.types import Trajectory


def part_with_outlived(
    buffer: ReplayBuffer, scorer: Scorer, module: PowerFlowModule, *, min_ess: float
) -> dict[str, float]:
    """Drop the oldest refills until what is held has an effective share of `min_ess`.

    It is made between a refill and its training, from one pass of the policy over what is stale:
    each rank scores its share, and all drop the same. Samples of the base have no part in the
    share, and leave with their groups.

    Returns:
        `rollout/stale_dropped`, trajectories; `rollout/ess`, of what is left.
    """
    held = own_samples(buffer)
    is_stale = torch.tensor([t.policy_version != module.global_step for t in held])
    stale = [t for t, old in zip(held, is_stale.tolist(), strict=True) if old]
    every = torch.zeros(len(held), dtype=torch.float64)  # of what it has just sampled: no pass
    if stale:
        mine = stale[ranks.share(len(stale))]
        every[is_stale] = torch.cat(ranks.gathered(lambda: log_ratios(scorer, module, mine)))
    sizes = [len(own_samples(group)) for group in buffer.refills.values()]
    by_refill = dict(zip(buffer.refills, every.split(sizes), strict=True))
    dropped = buffer.drop(outlived(by_refill, min_ess))
    left = torch.cat([by_refill[refill] for refill in buffer.refills])
    return {"rollout/stale_dropped": float(dropped), "rollout/ess": float(effective_share(left))}


def log_ratios(
    scorer: Scorer, module: PowerFlowModule, trajectories: Sequence[Trajectory]
) -> Tensor:
    """log pi_theta(y) - log pi_old(y) under the policy as it is now, (N,) nats."""
    log_pf = scorer.policy_log_probs(module, trajectories)
    pairs = zip(log_pf, trajectories, strict=True)
    ratios = [float((now - t.log_p_old).double().sum()) for now, t in pairs]
    return torch.tensor(ratios, dtype=torch.float64)
