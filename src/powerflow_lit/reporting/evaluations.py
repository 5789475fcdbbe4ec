"""Output folders of `powerflow_lit.evaluate`, and what pass@k curves can be drawn from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from powerflow_lit.config.schema import BootstrapConfig
from powerflow_lit.reporting.figures import LINES, MARKERS, Style, styles
from powerflow_lit.reporting.files import (
    Problems,
    Scores,
    UnreadableError,
    numbers,
    read_json,
    read_problems,
)
from powerflow_lit.reporting.grouping import COLOURS, Group, label_of
from powerflow_lit.reporting.points import BASE, PassLine
from powerflow_lit.reporting.runs import read_run, walk
from powerflow_lit.reporting.statistics import correct_counts
from powerflow_lit.reporting.tables import Row, cells, matching

AVG = re.compile(r"avg@(\d+)")


@dataclass(frozen=True)
class Evaluated:
    """One benchmark of an evaluation folder as read."""

    folder: Path
    label: str  # of the model: strategy and alpha of its run, or its name; the benchmark's
    strategy: str | None
    results: dict[str, dict[str, float]]  # val/ metrics by sampler
    samples: dict[str, Any]  # a problem, by sampler, where it is told
    problems: Problems | None


def read_evaluations(
    paths: Sequence[str], aliases: Mapping[str, str]
) -> tuple[list[Evaluated], list[str]]:
    """All evaluations at or below the paths, and a line for each that cannot be used."""
    found: list[Evaluated] = []
    remarks: list[str] = []
    for text in paths:
        folders = []
        for folder, files in walk(Path(text)):
            if "eval.json" in files:
                folders.append(folder)
            elif "problems.csv" in files and "metrics.csv" not in files:
                remarks.append(f"{folder}: no eval.json (of an older version, or lost)")
        if not folders:
            remarks.append(f"{text}: no eval.json there")
        for folder in folders:
            try:
                record = read_json(folder / "eval.json")
            except UnreadableError as error:
                remarks.append(f"{folder}: {error}")
                continue
            some, more = _benchmarks(folder, record, aliases)
            found += some
            remarks += more
    return _told_apart(found), remarks


def _benchmarks(
    folder: Path, record: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[list[Evaluated], list[str]]:
    """The benchmarks of an eval.json that hold results, and remarks on what is missing."""
    said = record.get("benchmarks")
    said = (
        {str(b): r for b, r in said.items() if isinstance(r, dict) and r}
        if isinstance(said, dict)
        else {}
    )
    if not said:
        return [], [f"{folder}: eval.json holds no results; left out"]
    remarks = []
    if record.get("status") != "finished":
        remarks.append(f"{folder}: unfinished (still running, or killed): what it has is shown")
    problems = read_problems(folder)
    if problems is None:
        remarks.append(f"{folder}: no problems.csv: neither pass@k curve nor intervals")
    label, strategy = _name(record, aliases)
    found = []
    for benchmark, results in said.items():
        by_sampler = {str(k): v for k, v in results.items() if isinstance(v, dict)}
        found.append(
            Evaluated(
                folder,
                label if len(said) == 1 else f"{label}, {benchmark}",
                strategy,
                {k: numbers(v.get("metrics")) for k, v in by_sampler.items()},
                {k: v.get("samples_per_prompt") for k, v in by_sampler.items()},
                None if problems is None else problems.of(benchmark),
            )
        )
    return found, remarks


def _name(record: Mapping[str, Any], aliases: Mapping[str, str]) -> tuple[str, str | None]:
    if record.get("run"):
        folder = Path(str(record["run"]))
        run, _ = read_run(folder, folder.name) if folder.is_dir() else (None, [])
        if run is None:
            return folder.name, None
        shown = {k: run.config.get(k) for k in ("strategy.name", "alpha")}
        return f"{label_of(shown, aliases)} seed={run.seed}", run.strategy
    model = str(record.get("model") or "unknown model")
    name = model.removeprefix("embedded:").rstrip("/").rpartition("/")[2]
    return f"base {name}" if model.startswith("embedded:") else name, None


def _told_apart(found: list[Evaluated]) -> list[Evaluated]:
    """With the folder's name after a label that several share."""
    labels = [e.label for e in found]
    return [
        e if labels.count(e.label) == 1 else replace(e, label=f"{e.label} ({e.folder.name})")
        for e in found
    ]


def table_of(
    found: Sequence[Evaluated], patterns: Sequence[str], settings: BootstrapConfig
) -> tuple[list[str], list[Row]]:
    """Metrics (val/ left out) and a line for each model and decoding."""
    known = {n.removeprefix("val/") for e in found for m in e.results.values() for n in m}
    names = matching(patterns, sorted(n for n in known if _of_all_samples(n, known)))
    rows = []
    for e in found:
        scores = e.problems.decodings() if e.problems else {}
        for decoding, metrics in e.results.items():
            one = [scores[decoding]] if decoding in scores else []
            count = str(e.samples.get(decoding) or "")
            rows.append(
                Row(f"{e.label}, {decoding}", count, cells([metrics], one, names, settings))
            )
    return names, rows


def _of_all_samples(name: str, known: set[str]) -> bool:
    """False for pass@k with fewer than all samples: those have a figure of their own."""
    kind, _, k = name.partition("@")
    return kind != "pass" or k == "1" or f"avg@{k}" in known


def counts_of(scores: Scores) -> tuple[np.ndarray, int] | None:
    """Correct samples of each problem and their number n, from avg@n; None without it or n = 1."""
    sizes = [int(m[1]) for name in scores.names if (m := AVG.fullmatch(name))]
    if not sizes or max(sizes) < 2:
        return None
    n = max(sizes)
    try:
        return correct_counts(scores.column(f"avg@{n}"), n), n
    except ValueError:
        return None


def pass_lines(found: Sequence[Evaluated], groups: Sequence[Group]) -> list[PassLine]:
    """A line for each evaluated model and decoding; without any, for the base and each group."""
    lines = []
    for place, e in enumerate(found):
        colour = COLOURS.get(e.strategy or "", BASE)
        for i, (decoding, scores) in enumerate(
            e.problems.decodings().items() if e.problems else ()
        ):
            counted = counts_of(scores)
            if counted is not None:
                style = Style(colour, LINES[i % len(LINES)], MARKERS[place % len(MARKERS)])
                lines.append(PassLine(f"{e.label}, {decoding}", style, [counted[0]], counted[1]))
    return lines or _of_runs(groups)


def _of_runs(groups: Sequence[Group]) -> list[PassLine]:
    lines, looks = [], styles(groups)
    base = next((p for g in groups for r in g.counted if (p := r.problems) is not None), None)
    for i, (decoding, scores) in enumerate((base.base() if base else {}).items()):
        counted = counts_of(scores)
        if counted is not None:
            style = Style(BASE, LINES[i % len(LINES)], "")
            lines.append(PassLine(f"base, {decoding}", style, [counted[0]], counted[1]))
    for g in groups:
        scored = [s for r in g.counted if (p := r.problems) and (s := p.final()) is not None]
        pairs = [c for s in scored if (c := counts_of(s)) is not None]
        sizes = {n for _, n in pairs}
        if len(sizes) == 1:
            (n,) = sizes
            lines.append(PassLine(g.label, looks[g.label], [c for c, _ in pairs], n))
    return lines
