"""Means, spreads over seeds and pass@k curves. Pure functions on arrays.

P problems, S runs (seeds).
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
