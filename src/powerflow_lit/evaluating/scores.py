"""From draws to figures: of each prompt, their means, and how sure these are.

P prompts, M metrics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from powerflow_lit.evaluating.benchmarks import Benchmark
from powerflow_lit.judging.assessors import Assessor
from powerflow_lit.metrics import at_k
from powerflow_lit.metrics.bootstrap import bootstrap
from powerflow_lit.samplers import Draws
from powerflow_lit.tasks.base import Response, Sampled, Task

AVG = re.compile(r"(?:val/)?avg@(\d+)")


@dataclass(frozen=True)
class Scored:
    """A benchmark under one sampler."""

    figures: list[dict[str, float]]  # of each prompt, without `val/`
    rows: list[dict[str, Any]]  # of each response, for responses.jsonl


def score(
    benchmark: Benchmark,
    draws: Draws,
    assessor: Assessor | None,
    on_progress: Callable[[str, int, int], None],
) -> Scored:
    """Figures of the task, of the sampler and of the judge; and a row for each response."""
    task, total = benchmark.task, len(benchmark.prompts)
    figures: list[dict[str, float]] = []
    rows: list[dict[str, Any]] = []
    for number, sample in enumerate(draws.samples, start=1):
        correct = [task.is_correct(sample.prompt, r.text) for r in sample.responses]
        known = _figures(task, sample, draws.samples_per_prompt)
        if _has_answers(known) and None not in correct:
            known |= pass_curve(correct, draws.samples_per_prompt)
        figures.append(known)
        rows += [_row(task, sample, place, right) for place, right in enumerate(correct)]
        on_progress("scoring", number, total)
    for one, more in zip(figures, draws.figures, strict=False):
        one |= more
    if assessor is not None:
        judged = [s for s in draws.samples if s.responses]
        places = [i for i, s in enumerate(draws.samples) if s.responses]
        assessed = assessor.assess(judged, lambda done, all_: on_progress("judging", done, all_))
        for place, more in zip(places, assessed, strict=True):
            figures[place] |= more
    return Scored(figures, rows)


def _figures(task: Task, sample: Sampled, wanted: int) -> dict[str, float]:
    """The task's figures of a prompt that may lack some of its responses.

    A missing response counts as an empty, wrong one in figures over k samples (`...@k`); figures
    of text are over those that are there, and left out where there is none.
    """
    missing = wanted - len(sample.responses)
    if missing == 0:
        return task.score(sample)
    blank = Response("", (), truncated=False)
    filled = task.score(Sampled(sample.prompt, sample.responses + (blank,) * missing))
    there = task.score(sample) if sample.responses else {}
    return {
        name: value if "@" in name else there[name]
        for name, value in filled.items()
        if "@" in name or name in there
    }


def _has_answers(figures: Mapping[str, float]) -> bool:
    return any(AVG.fullmatch(name) for name in figures)


def pass_curve(correct: Sequence[bool | None], n: int) -> dict[str, float]:
    """Unbiased pass@k of a problem for k = 1, 2, 4, ... below n, and n itself."""
    flags = [bool(c) for c in correct] + [False] * (n - len(correct))
    sizes = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
    return {f"pass@{k}": at_k.pass_at_k([flags], k) for k in sizes}


def _row(task: Task, sample: Sampled, place: int, correct: bool | None) -> dict[str, Any]:
    response = sample.responses[place]
    return {
        "prompt_id": sample.prompt.id,
        "sample": place,
        "prompt": sample.prompt.text,
        "response": response.text,
        "answer": task.answer(response.text),
        "correct": correct,
        "length": len(response.token_ids),
        "truncated": response.truncated,
        "formatted": task.is_formatted(response.text),
    }


@dataclass(frozen=True)
class Summary:
    """Means over prompts by `val/` name, and how sure they are."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # over problems
    sampling_errors: dict[str, float]  # of avg@k: what sampling the same problems again would move


def summary(
    figures: Sequence[Mapping[str, float]], *, draws: int, level: float, seed: int
) -> Summary:
    """Means, percentile bootstrap intervals over problems, and standard errors of sampling.

    A prompt without a figure has no part in that figure's mean.
    """
    finite = [{n: v for n, v in one.items() if math.isfinite(v)} for one in figures]
    names = list(dict.fromkeys(name for one in finite for name in one))
    values = np.array([[one.get(n, np.nan) for n in names] for one in finite])  # (P, M)
    between = bootstrap(values, draws=draws, level=level, seed=seed)
    means = [float(np.nanmean(values[:, m])) for m in range(len(names))]
    errors = {}
    for m, name in enumerate(names):
        if (match := AVG.fullmatch(name)) and int(match[1]) > 1:
            errors[f"val/{name}"] = sampling_error(values[:, m], int(match[1]))
    return Summary(
        {f"val/{n}": v for n, v in zip(names, means, strict=True)},
        {
            f"val/{n}": (float(low), float(high))
            for n, (low, high) in zip(names, between, strict=True)
            if math.isfinite(low)
        },
        errors,
    )


def sampling_error(shares: np.ndarray, n: int) -> float:
    """Standard error of avg@n when the same P problems are sampled again.

    sqrt(sum_p s_p (1 - s_p) / (n - 1)) / P with s_p the share of n samples that were correct;
    problems without one (nan) do not count.
    """
    shares = shares[np.isfinite(shares)]
    return float(np.sqrt(np.sum(shares * (1 - shares) / (n - 1))) / len(shares))


def average_interval(
    columns: Sequence[np.ndarray], *, draws: int, level: float, seed: int
) -> tuple[float, float]:
    """Interval of the plain mean of several benchmarks' means, problems resampled within each.

    Args:
        columns: a metric of each benchmark's problems, (P_b,) each.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(draws)
    for column in columns:
        chosen = generator.multinomial(len(column), np.full(len(column), 1 / len(column)), draws)
        means += chosen @ column / len(column)
    tail = 50 * (1 - level)
    low, high = np.percentile(means / len(columns), [tail, 100 - tail])
    return float(low), float(high)
