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
    buffer: ReplayBuffer, scorer: Scorer, module: PowerFlowModule
) -> dict[int, Tensor]:
    """Log-ratios of the policy's own samples that a buffer holds, by refill, (N,) nats each.

    For the policy as it is now, from one pass over what is older: each rank scores its share. A
    stop may come in that pass, so it is made before the buffer takes the next refill: a checkpoint
    never holds one whose stale ones were not looked at.
    """
    held = own_samples(buffer)
    is_stale = torch.tensor(
        [t.policy_version != module.global_step for t in held], dtype=torch.bool
    )
    stale = [t for t, old in zip(held, is_stale.tolist(), strict=True) if old]
    every = torch.zeros(len(held), dtype=torch.float64)  # of what the policy itself has sampled
    if stale:
        mine = stale[ranks.share(len(stale))]
        every[is_stale] = torch.cat(ranks.gathered(lambda: log_ratios(scorer, module, mine)))
    sizes = [len(own_samples(group)) for group in buffer.refills.values()]
    return dict(zip(buffer.refills, every.split(sizes), strict=True))


def part_with_outlived(
    buffer: ReplayBuffer, ratios: Mapping[int, Tensor], *, min_ess: float
) -> dict[str, float]:
    """Drop the oldest refills until what is held has an effective share of `min_ess`.

    Samples of the base have no part in the share, and leave with their groups.

    Args:
        ratios: `stale_ratios` of what was held before the newest refill, which is the policy's own.

    Returns:
        `rollout/stale_dropped`, trajectories; `rollout/ess`, of what is left.
    """
    newest = torch.zeros(len(own_samples(buffer.newest)), dtype=torch.float64)
    held = {**ratios, buffer.refill: newest}
    held = {refill: held[refill] for refill in buffer.refills}  # without what became too stale
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
