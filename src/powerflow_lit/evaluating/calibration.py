"""A released checkpoint's figures against the row that the paper reports of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.schema import CalibrateConfig
from powerflow_lit.published import CREATIVE, REASONING, Published, models, published

PASS, OUTSIDE = "pass", "outside"
NOT_MEASURED, NOT_COMPARABLE = "not measured", "not comparable"


@dataclass(frozen=True)
class Check:
    """One figure: ours, the paper's and how far they may lie apart; all in points (percent)."""

    benchmark: str
    metric: str
    ours: float | None
    published: float
    standard_error: float | None  # of ours; the paper's is taken to be the same
    allowed: float | None
    verdict: str


def row_of(config: CalibrateConfig, paper_name: str | None) -> Published:
    """The published row to compare with, before anything is sampled.

    Raises:
        ConfigError: no such table, model or method.
    """
    if config.table not in (REASONING, CREATIVE):
        raise ConfigError(f"calibrate.table={config.table}: choose {REASONING} or {CREATIVE}")
    found = published(config.table, paper_name)
    if found is None:
        known = ", ".join(models(config.table))
        raise ConfigError(f"model.paper_name={paper_name}: nothing published of it; known: {known}")
    if config.method not in found.rows:
        raise ConfigError(
            f"calibrate.method={config.method}: the rows of {paper_name} are "
            f"{', '.join(found.rows)}"
        )
    return found


def checks(
    config: CalibrateConfig,
    row: Published,
    benchmarks: Mapping[str, Mapping[str, Any]],
    average: Mapping[str, Any] | None,
    incomparable: Sequence[str] = (),
    level: float = 0.95,
) -> list[Check]:
    """Every published figure of the row against ours.

    Two runs of one protocol differ by sampling alone, with a standard deviation of sqrt(2)
    standard errors; `tolerance` points are added for what is not known of the paper's protocol:

        |ours - published| <= tolerance + standard_errors * sqrt(2) * standard error

    Args:
        benchmarks: results by benchmark and sampler, as in eval.json.
        average: the average over benchmarks under that sampler, where there is one.
        incomparable: metrics that were measured by other means than the paper's.
        level: of the intervals in the results.
    """
    found = []
    for name, value in row.rows[config.method].items():
        if row.metric is None:  # creative: a column is a metric of whatever was evaluated
            metric, scale = f"val/{name}", 100.0
            benchmark = next(iter(benchmarks), "")
        else:
            metric, scale, benchmark = row.metric, 1.0, name
        result = (
            average if benchmark == "average" else benchmarks.get(benchmark, {}).get(config.sampler)
        )
        ours = (result or {}).get("metrics", {}).get(metric)
        published = value * scale
        if ours is None or result is None:
            found.append(Check(benchmark, metric, None, published, None, None, NOT_MEASURED))
            continue
        error = 100 * _standard_error(result, metric, level)
        allowed = config.tolerance + config.standard_errors * math.sqrt(2) * error
        verdict = PASS if abs(100 * ours - published) <= allowed else OUTSIDE
        if metric in incomparable:
            verdict = NOT_COMPARABLE
        found.append(Check(benchmark, metric, 100 * ours, published, error, allowed, verdict))
    return found


def _standard_error(result: Mapping[str, Any], metric: str, level: float) -> float:
    """Of sampling where it is known (avg@k), else of the mean over prompts, from its interval."""
    if metric in result.get("sampling_errors", {}):
        return float(result["sampling_errors"][metric])
    low, high = result.get("intervals", {}).get(metric, (0.0, 0.0))
    return float(high - low) / (2 * NormalDist().inv_cdf((1 + level) / 2))


def caveats(table: str, record: Mapping[str, Any]) -> list[str]:
    """What a reader of the verdicts must bear in mind."""
    if table == REASONING:
        return ["the paper's token limit and grader are not known"]
    judge = (record["judge"] or {}).get("model", "none")
    return [
        f"the paper's judge and embedder are not known (here: {judge}, {record['embedder']}); "
        "figures of different ones do not compare, so a verdict holds for the same ones only"
    ]


def verdict(found: Sequence[Check]) -> str:
    """`outside` if any figure is, `not measured` if none could be compared, else `pass`."""
    verdicts = {check.verdict for check in found}
    if OUTSIDE in verdicts:
        return OUTSIDE
    return PASS if PASS in verdicts else NOT_MEASURED


def calibrated(
    config: CalibrateConfig,
    row: Published,
    record: Mapping[str, Any],
    benchmarks: Sequence[str],
    averages: Mapping[str, Any],
    level: float = 0.95,
) -> dict[str, Any]:
    """The calibration as it stands in eval.json.

    Args:
        record: eval.json; `benchmarks` are those of its benchmarks that were asked for.
        averages: over them, by sampler. They compare only where they are over the row's own.
    """
    whole = set(benchmarks) == set(row.rows[config.method]) - {"average"}
    average = averages.get(config.sampler) if whole else None
    # the embedder that ships with the package counts words, the paper's surely does more
    words_only = str(record["embedder"]).startswith("hashing")
    found = checks(
        config,
        row,
        {b: record["benchmarks"][b] for b in benchmarks},
        average,
        ("val/diversity_semantic",) if words_only else (),
        level,
    )
    return {
        "paper_name": row.model,
        "method": config.method,
        "sampler": config.sampler,
        "tolerance": config.tolerance,
        "standard_errors": config.standard_errors,
        "source": row.source,
        "verdict": verdict(found),
        "checks": [asdict(check) for check in found],
        "caveats": caveats(config.table, record),
    }
