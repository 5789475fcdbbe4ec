"""The `rollout/` metrics of a refill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from powerflow_lit.metrics import text
from powerflow_lit.types import Trajectory

# of which the whole has the greatest, not a mean
GREATEST = {"selfcheck/engine_logp_gap", "selfcheck/base_logp_gap"}


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """By name, prefix included; lengths in tokens, log-probs in nats."""
    lengths = torch.tensor([t.length for t in trajectories], dtype=torch.float64)
    correct = [t.correct for t in trajectories if t.correct is not None]
    unique = {(t.group, t.response_ids) for t in trajectories}
    metrics = {
        "length_mean": float(lengths.mean()),
        "length_std": float(lengths.std(unbiased=False)),
        "truncated_frac": _mean([t.truncated for t in trajectories]),
        "format_rate": _mean([t.formatted for t in trajectories]),
        "repetition": _mean([text.repetition(t.response_ids) for t in trajectories]),
        "unique_frac": len(unique) / len(trajectories),
        "log_p_base_per_token": float(
            sum(t.log_p_base.sum() for t in trajectories) / lengths.sum()
        ),
    }
    if correct:
        metrics["accuracy"] = _mean(correct)
    metrics |= reward_metrics(trajectories)
    return {f"rollout/{name}": value for name, value in metrics.items()}


def reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean and spread of the rewards, and the share of prompts whose rollouts all got the same,
    which teaches nothing; nothing where there are no rewards."""
    groups: dict[int, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.reward is not None:
            groups.setdefault(trajectory.group, []).append(trajectory.reward)
    if not groups:
        return {}
    rewards = torch.tensor([r for group in groups.values() for r in group], dtype=torch.float64)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(unbiased=False)),
        "reward_flat_frac": _mean([max(g) == min(g) for g in groups.values()]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pooled(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """What ranks have found in scoring their parts of a refill, as of the whole.

    Args:
        parts: metrics by name, the same names in all, and the tokens that they are of.
    """
    (first, _), tokens = parts[0], sum(count for _, count in parts)
    found = {
        name: sum(metrics[name] * count for metrics, count in parts) / tokens for name in first
    }
    return {**found, **{n: max(m[n] for m, _ in parts) for n in GREATEST & first.keys()}}


def log_prob_gap(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> tuple[float, float]:
    """Largest and mean difference of a token's log-probs, nats; 0 where there is no token.

    `theirs`, the engine's, may lack the last token of a row that fills the model's context.
    """
    pairs = [(a[: len(b)] - b).abs() for a, b in zip(ours, theirs, strict=True)]
    every = torch.cat([torch.zeros(0), *pairs])
    return (float(every.max()), float(every.mean())) if len(every) else (0.0, 0.0)
