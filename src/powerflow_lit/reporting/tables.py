"""The final table, the table of evaluations and results.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerflow_lit.config.schema import BootstrapConfig
from powerflow_lit.metrics.bootstrap import bootstrap
from powerflow_lit.reporting.files import Scores
from powerflow_lit.reporting.grouping import Group, short_key
from powerflow_lit.reporting.runs import Run
from powerflow_lit.reporting.statistics import deviation, mean, over_seeds

VERSIONS = ("torch", "vllm", "transformers")
ABOUT = {"alpha", "seed", "strategy.name", "task.name", "model.name"}  # columns of their own


@dataclass(frozen=True)
class Cell:
    """A final figure: mean over runs, sd over runs, interval over problems (nan: none)."""

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        digits = 1 if abs(self.mean) >= 10 else 3
        text = f"{self.mean:.{digits}f}"
        if not math.isnan(self.sd):
            text += f" ± {self.sd:.{digits}f}"
        if not math.isnan(self.low):
            text += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return text


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    label: str
    count: str
    cells: Mapping[str, Cell]


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names in the order of the patterns; one that ends in @ takes any k, smaller k first.

    k = 1 is left out where there is a larger k: avg@ estimates the same from more samples.
    """

    def size(name: str) -> int:
        k = name.rpartition("@")[2]
        return int(k) if k.isdigit() else 0

    found: list[str] = []
    for pattern in patterns:
        wild = pattern.endswith("@")
        hits = [n for n in names if (n.startswith(pattern) if wild else n == pattern)]
        if wild and any(size(n) > 1 for n in hits):
            hits = [n for n in hits if size(n) > 1]
        found += [n for n in sorted(set(hits), key=size) if n not in found]
    return found


def final_table(
    groups: Sequence[Group], patterns: Sequence[str], settings: BootstrapConfig
) -> tuple[list[str], list[Row]]:
    """Metrics (val/ left out) and lines: the base by decoding first, then each group."""
    runs = [r for g in groups for r in g.counted]
    known = {n.removeprefix("val/") for r in runs for n in (*r.base, *r.final)}
    names = matching(patterns, sorted(known))
    rows = base_rows(runs, names, settings)
    for g in groups:
        scores = [p.final() for r in g.counted if (p := r.problems) is not None]
        whole = [s for s in scores if s is not None]
        finals = [r.final for r in g.counted]
        # an interval over the problems of some seeds would not belong to the mean over all
        complete = whole if len(whole) == len(finals) else []
        rows.append(Row(g.label, g.count, cells(finals, complete, names, settings)))
    return names, rows


def base_rows(runs: Sequence[Run], names: Sequence[str], settings: BootstrapConfig) -> list[Row]:
    """The base of each task and model at T=1 and by every other decoding."""
    rows = []
    places = dict.fromkeys((r.config.get("task.name"), r.config.get("model.name")) for r in runs)
    for place in places:
        here = [r for r in runs if (r.config.get("task.name"), r.config.get("model.name")) == place]
        where = f" ({place[0]}, {place[1]})" if len(places) > 1 else ""
        by_name = decodings_of(here)
        scores = next((p.base() for r in here if (p := r.problems) is not None), {})
        for name, figures in by_name.items():
            one = [scores[name]] if name in scores else []
            # the same model and seed in every run: an average, and no spread to speak of
            found = cells([figures], one, names, settings)
            rows.append(Row(f"base, {name}{where}", "", found))
    return rows


def decodings_of(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """`val/` metrics of the base by decoding, T=1 first, averaged over runs."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        named = {"T=1": run.base, **run.base_decodings}
        problems = run.problems
        for name, scores in (problems.base() if problems else {}).items():
            if not named.get(name):  # only where summary.json does not say
                columns = scores.values.T
                known = {n: c[~_nan(c)] for n, c in zip(scores.names, columns, strict=True)}
                named[name] = {f"val/{n}": float(c.mean()) for n, c in known.items() if len(c)}
        for name, figures in named.items():
            place = found.setdefault(name, {})
            for metric, value in figures.items():
                place.setdefault(metric, []).append(value)
    return {n: {m: mean(v) for m, v in d.items()} for n, d in found.items() if d}


def _nan(values: Any) -> Any:
    return values != values


def cells(
    figures: Sequence[Mapping[str, float]],
    scores: Sequence[Scores],
    names: Sequence[str],
    settings: BootstrapConfig,
) -> dict[str, Cell]:
    """Mean and sd of the runs' figures (names with val/), intervals from their problems."""
    intervals: dict[str, tuple[float, float]] = {}
    together = over_seeds(scores)
    if together is not None:
        limits = bootstrap(
            together.values, draws=settings.draws, level=settings.level, seed=settings.seed
        )
        intervals = {n: (float(a), float(b))
                     for n, (a, b) in zip(together.names, limits, strict=True)}  # fmt: skip
    found = {}
    for name in names:
        source = name
        if name.startswith("avg@") and not any(f"val/{name}" in f for f in figures):
            source = "pass@1"  # greedy has one sample
        values = [f[f"val/{source}"] for f in figures if f"val/{source}" in f]
        low, high = intervals.get(source, (math.nan, math.nan)) if values else (math.nan, math.nan)
        found[name] = Cell(mean(values), deviation(values), low, high)
    return found


def markdown(names: Sequence[str], rows: Sequence[Row], what: str = "runs") -> str:
    """A table as markdown."""
    lines = [f"| | {what} | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        figures = " | ".join(str(row.cells[n]) for n in names)
        lines.append(f"| {row.label} | {row.count or '-'} | {figures} |")
    return "\n".join(lines) + "\n"


def write_table_csv(path: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    """The table with a column each for mean, sd and both ends of the interval."""
    parts = ("mean", "sd", "low", "high")
    header = ["group", "runs", *(f"{n}_{p}" for n in names for p in parts)]
    lines = [[r.label, r.count, *(_figure(getattr(r.cells[n], p)) for n in names for p in parts)]
             for r in rows]  # fmt: skip
    _write(path, [header, *lines])


def write_results(
    path: Path,
    runs: Sequence[Run],
    keys: Sequence[str],
    headline: str | None,
    aliases: Mapping[str, str],
) -> None:
    """One row for each run: what it was, how it went, its base and final figures, its peak."""
    more = [k for k in keys if k not in ABOUT]
    finals = sorted({n for r in runs for n in r.final})
    bases = sorted({n for r in runs for n in r.base})
    header = ["run", "task", "model", "strategy", "alpha", *(short_key(k, aliases) for k in more),
              "seed", "status", "refills", "wall_s", "git_commit", *VERSIONS,
              "headline", "peak", "peak_refill",
              *(f"base_{n.removeprefix('val/')}" for n in bases),
              *(f"final_{n.removeprefix('val/')}" for n in finals)]  # fmt: skip
    lines = []
    for run in runs:
        said = run.summary.get("versions")
        versions = said if isinstance(said, dict) else {}
        peak, at = peak_of(run, headline)
        lines.append(
            [run.name, run.config.get("task.name"), run.config.get("model.name"), run.strategy,
             run.config.get("alpha"), *(run.config.get(k) for k in more), run.seed, run.status,
             run.refills, _figure(run.summary.get("wall_s")), short_commit(run),
             *(versions.get(v) for v in VERSIONS),
             (headline or "").removeprefix("val/"), _figure(peak), at,
             *(_figure(run.base.get(n)) for n in bases),
             *(_figure(run.final.get(n)) for n in finals)]
        )  # fmt: skip
    _write(path, [header, *lines])


def peak_of(run: Run, headline: str | None) -> tuple[float | None, int | None]:
    """Greatest value of the headline metric after the start, and its (first) refill."""
    curve = {r: v for r, v in run.curve(headline or "").items() if r > 0}
    if not curve:
        return None, None
    at = max(curve, key=lambda r: (curve[r], -r))
    return curve[at], at


def short_commit(run: Run) -> str:
    """Ten digits of the commit, and -dirty where the tree was changed."""
    text = str(run.summary.get("git_commit") or "")
    commit, dash, dirty = text.partition("-")
    return commit[:10] + dash + dirty


def _figure(value: Any) -> str:
    """Six digits; nothing for nan or None."""
    if not isinstance(value, int | float) or math.isnan(value):
        return ""
    return f"{value:.6g}"


def _write(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["" if v is None else v for v in line] for line in lines])
