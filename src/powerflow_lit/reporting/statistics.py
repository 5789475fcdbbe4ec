"""Means, spreads, bootstrap intervals over problems and pass@k. Pure functions on arrays.

P problems, M metrics, S runs (seeds), B bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from powerflow_lit.reporting.files import Scores


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of the sample (divided by S - 1); nan of fewer than two."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def over_seeds(scores: Sequence[Scores]) -> Scores | None:
    """Each problem's figures averaged over runs: problems and metrics that all of them have."""
    if not scores:
        return None
    names = tuple(n for n in scores[0].names if all(n in s.names for s in scores))
    shared = set.intersection(*(set(s.prompts) for s in scores))
    prompts = tuple(p for p in scores[0].prompts if p in shared)
    if not names or not prompts:
        return None
    stack = []
    for s in scores:
        place = {p: i for i, p in enumerate(s.prompts)}
        rows = [place[p] for p in prompts]
        stack.append(s.values[rows][:, [s.names.index(n) for n in names]])
    return Scores(prompts, names, np.mean(stack, axis=0))


def bootstrap(values: np.ndarray, *, draws: int, level: float, seed: int) -> np.ndarray:
    """Percentile intervals of the mean over problems, (P, M) -> (M, 2).

    Problems are resampled with replacement, all metrics by the same draws. A nan (a problem
    without that figure) has no weight. nan where a metric has fewer than two problems.
    """
    problems = len(values)
    finite = np.isfinite(values)
    if problems == 0:
        return np.full((values.shape[1], 2), np.nan)
    counts = _draws(problems, draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ np.where(finite, values, 0.0)) / (counts @ finite.astype(float))  # (B, M)
    tail = 50 * (1 - level)
    # a draw may hold none of a metric's few problems
    usable = np.isfinite(means)
    interval = np.full((values.shape[1], 2), np.nan)
    for m in np.flatnonzero(finite.sum(0) > 1):
        interval[m] = np.percentile(means[usable[:, m], m], [tail, 100 - tail])
    return interval


@lru_cache(maxsize=4)
def _draws(problems: int, draws: int, seed: int) -> np.ndarray:
    """How often each problem is in each draw, (B, P); float, for products at full speed."""
    chances = np.full(problems, 1 / problems)
    counts = np.random.default_rng(seed).multinomial(problems, chances, size=draws)
    return counts.astype(float)


@lru_cache
def pass_at_k_table(n: int) -> np.ndarray:
    """1 - C(n-c, k) / C(n, k) for c = 0..n correct of n samples and k = 1..n, (n+1, n)."""
    rows = [[1 - math.comb(n - c, k) / math.comb(n, k) for k in range(1, n + 1)]
            for c in range(n + 1)]  # fmt: skip
    return np.array(rows)


def correct_counts(shares: np.ndarray, n: int) -> np.ndarray:
    """How many of n samples were correct, from shares (avg@n), (P,) -> (P,) int.

    Raises:
        ValueError: a share is no multiple of 1/n within 0..1.
    """
    counts = np.rint(shares * n)
    good = np.isfinite(shares) & (np.abs(shares * n - counts) < 1e-2)
    if not np.all(good & (counts >= 0) & (counts <= n)):
        raise ValueError(f"avg@{n} is no multiple of 1/{n}")
    return counts.astype(int)


def pass_at_k(counts: np.ndarray, n: int) -> np.ndarray:
    """Unbiased pass@k of each problem for k = 1..n, (P,) -> (P, n)."""
    found: np.ndarray = pass_at_k_table(n)[counts]
    return found


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window (rounded up to odd), narrower at both ends; 1 changes nothing."""
    half = max(window, 1) // 2
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def band(
    curves: Sequence[dict[int, float]], smooth: int = 1
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Refills that all curves have, and the mean, least and greatest value there."""
    curves = [c for c in curves if c]
    if not curves:
        return [], [], [], []
    refills = sorted(set.intersection(*(set(c) for c in curves)))
    smoothed = [running_mean([c[r] for r in refills], smooth) for c in curves]
    points = list(zip(*smoothed, strict=True))
    return refills, [mean(p) for p in points], [min(p) for p in points], [max(p) for p in points]
