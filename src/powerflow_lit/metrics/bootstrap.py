"""Bootstrap intervals over problems. P problems, M metrics, B draws."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


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
