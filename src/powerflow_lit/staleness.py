"""Which stale refills a run still trains on (`buffer.min_ess`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from powerflow_lit import ranks
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.objectives.weights import effective_share, outlived
from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.scoring import Scorer
from powerflow_lit.trajectories import own_samples
from powerflow_lit.types import Trajectory


def stale_ratios(
    buffer: ReplayBuffer, scorer: Scorer, module: PowerFlowModule, refill: int
) -> dict[int, Tensor]:
    """Log-ratios of the policy's own samples that will be held beside a coming refill, by refill,
    (N,) nats each.

    For the policy as it is now, from one pass over what is older: each rank scores its share. A
    stop may come in that pass, so it is made before the buffer takes the next refill: a checkpoint
    never holds one whose stale ones were not looked at.
    """
    groups = {old: own_samples(held) for old, held in buffer.held_beside(refill).items()}
    every = [t for group in groups.values() for t in group]
    is_old = [t.policy_version != module.global_step for t in every]
    stale = [t for t, older in zip(every, is_old, strict=True) if older]
    ratios = torch.zeros(len(every), dtype=torch.float64)  # of what the policy itself has sampled
    if stale:
        mine = stale[ranks.share(len(stale))]
        found = ranks.gathered(lambda: log_ratios(scorer, module, mine))
        ratios[torch.tensor(is_old)] = torch.cat(found)
    sizes = [len(group) for group in groups.values()]
    return dict(zip(groups, ratios.split(sizes), strict=True))


def part_with_outlived(
    buffer: ReplayBuffer, ratios: Mapping[int, Tensor], *, min_ess: float
) -> dict[str, float]:
    """Drop the oldest refills until what is held has an effective share of `min_ess`.

    Samples of the base have no part in the share, and leave with their groups.

    Args:
        ratios: `stale_ratios` beside the newest refill, which is the policy's own.

    Returns:
        `rollout/stale_dropped`, trajectories; `rollout/ess`, of what is left.
    """
    newest = torch.zeros(len(own_samples(buffer.newest)), dtype=torch.float64)
    held = {**ratios, buffer.refill: newest}
    dropped = buffer.drop(outlived(held, min_ess))
    left = torch.cat([held[refill] for refill in buffer.refills])
    return {"rollout/stale_dropped": float(dropped), "rollout/ess": float(effective_share(left))}


def log_ratios(
    scorer: Scorer, module: PowerFlowModule, trajectories: Sequence[Trajectory]
) -> Tensor:
    """log pi_theta(y) - log pi_old(y) under the policy as it is now, (N,) nats."""
    log_pf = scorer.policy_log_probs(module, trajectories)
    pairs = zip(log_pf, trajectories, strict=True)
    ratios = [float((now - t.log_p_old).double().sum()) for now, t in pairs]
    return torch.tensor(ratios, dtype=torch.float64)
