"""Run folders as read: every folder found, and a remark for each that is not a finished run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from powerflow_lit.reporting.files import (
    Problems,
    Sheet,
    UnreadableError,
    number,
    numbers,
    read_config,
    read_json,
    read_problems,
    read_sheet,
    read_yaml,
)

MARKS = ("metrics.csv", "summary.json", "config.yaml")  # any of them makes a run folder
INSIDE = ("checkpoints", "export", "wandb", ".hydra")  # large folders of a run; never entered
# what summary.json repeats of the config, for folders without config.yaml
SHARED = {
    "task.name": "task", "model.name": "model", "strategy.name": "strategy", "alpha": "alpha",
    "epsilon": "epsilon", "seed": "seed",
}  # fmt: skip
BAR_AFTER_S = 2.0


@dataclass(frozen=True)
class Run:
    """A run folder as read."""

    folder: Path
    name: str  # short: the path below the folder that was asked for
    status: str  # finished | interrupted | diverged | failed | unfinished (no summary)
    summary: dict[str, Any]
    config: dict[str, Any]  # dotted keys
    overrides: tuple[str, ...]
    sheet: Sheet
    written: tuple[float, float]  # seconds since 1970: config.yaml, last file
    _curves: dict[str, dict[int, float]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def strategy(self) -> str:
        return str(self.config.get("strategy.name", "unknown"))

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def refills(self) -> int:
        """Refills that were done."""
        said = number(self.summary.get("refills"))
        return int(said) if said is not None else max(self._refills, default=0)

    @property
    def planned(self) -> int | None:
        """Refills that the configuration asks for."""
        asked = number(self.config.get("refills"))
        return None if asked is None else int(asked)

    @cached_property
    def base(self) -> dict[str, float]:
        """`val/` metrics of the base at T=1."""
        return numbers(self.summary.get("base")) or self._evaluated(first=True)

    @cached_property
    def final(self) -> dict[str, float]:
        """`val/` metrics of the policy when it was last evaluated; empty if it never was."""
        said, seen = numbers(self.summary.get("final")), self._evaluated(first=False)
        # a run stopped before its first evaluation repeats its base as final
        repeated = said == self.base and not self.finished and not seen
        return {} if repeated else said or seen

    @cached_property
    def base_decodings(self) -> dict[str, dict[str, float]]:
        """`val/` metrics of the base by other decodings."""
        found = self.summary.get("base_decodings")
        return {str(k): numbers(v) for k, v in found.items()} if isinstance(found, dict) else {}

    @cached_property
    def problems(self) -> Problems | None:
        return read_problems(self.folder)

    @cached_property
    def metrics(self) -> set[str]:
        """Names of metrics.csv."""
        return set(self.sheet.columns) - {"step", "refill"}

    def curve(self, metric: str) -> dict[int, float]:
        """Last finite value by refill; refill 1's rollouts are the base's, drawn at 0."""
        if metric not in self._curves:
            column = self.sheet.columns.get(metric)
            shift = 1 if metric.startswith("rollout/") else 0
            points: dict[int, float] = {}
            for refill, row in zip(self._refills, self.sheet.rows, strict=True):
                if column is None or refill < 0 or not row[column]:
                    continue
                value = number(row[column])
                if value is not None:
                    points[refill - shift] = value
            self._curves[metric] = points
        return self._curves[metric]

    def last(self, metric: str) -> float | None:
        """The final figure: the summary's for val/, else the end of the curve."""
        if metric.startswith("val/"):
            return self.final.get(metric)
        curve = self.curve(metric)
        return curve[max(curve)] if curve else None

    def first(self, metric: str) -> float | None:
        """The base's figure: the summary's for val/, else the curve at refill 0."""
        return self.base.get(metric, self.curve(metric).get(0))

    @cached_property
    def _refills(self) -> list[int]:
        column = self.sheet.columns.get("refill")
        if column is None:
            return [-1] * len(self.sheet.rows)
        found = [number(row[column]) for row in self.sheet.rows]
        return [-1 if r is None else int(r) for r in found]

    def _evaluated(self, *, first: bool) -> dict[str, float]:
        found = {}
        for metric in self.metrics:
            curve = self.curve(metric) if metric.startswith("val/") else {}
            at = 0 if first else max(curve, default=0)
            if at in curve and (first or at > 0):
                found[metric] = curve[at]
        return found


@dataclass
class Collection:
    """All that was found below the folders asked for."""

    runs: list[Run] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # a line for each thing amiss
    sweeps: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)  # sweep.json files


def collect(paths: Sequence[str]) -> Collection:
    """Every run at or below the paths, at any depth, each once."""
    found, seen = Collection(), set()
    folders: list[tuple[Path, str]] = []
    for text in paths:
        root = Path(text)
        if not root.is_dir():
            found.remarks.append(f"{text}: no such folder")
            continue
        missing: set[Path] = set()
        here = []
        for folder, files in walk(root):
            if "sweep.json" in files:
                missing |= _missing_jobs(folder, found)
            if any(mark in files for mark in MARKS) and folder.resolve() not in seen:
                here.append(folder)
                seen.add(folder.resolve())
        if not here and not missing:
            found.remarks.append(f"{text}: no run folder there")
        prefix = f"{root.resolve().name}/" if len(paths) > 1 else ""
        for folder in here:
            if folder not in missing:
                inner = folder.relative_to(root).as_posix()
                name = prefix + inner if inner != "." else root.resolve().name
                folders.append((folder, name))
    missing_jobs, found.remarks = found.remarks, []
    for folder, name in tracked(folders, "reading runs"):
        run, remarks = read_run(folder, name)
        found.remarks += remarks
        if run is not None:
            found.runs.append(run)
    found.remarks += missing_jobs  # last: while a sweep runs, there are many
    return found


def read_runs(paths: Sequence[str]) -> tuple[list[Run], list[str]]:
    """All runs at or below the paths, and a line for each that cannot be used as finished."""
    found = collect(paths)
    return found.runs, found.remarks


def walk(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Folders at and below `root` in order with the names of their files."""
    for folder, folders, files in os.walk(root, followlinks=False):
        folders[:] = sorted(f for f in folders if f not in INSIDE)
        yield Path(folder), set(files)


def _missing_jobs(folder: Path, found: Collection) -> set[Path]:
    """Folders of jobs in sweep.json that left no metrics.csv; each gets its remark."""
    try:
        sweep = read_json(folder / "sweep.json")
        jobs = sweep.get("jobs") or []
        named = [(str(j["folder"]), " ".join(map(str, j.get("overrides") or []))) for j in jobs]
    except (UnreadableError, TypeError, KeyError, AttributeError):
        found.remarks.append(f"{folder}: sweep.json unreadable: cannot tell which jobs are missing")
        return set()
    found.sweeps.append((folder, sweep))
    missing = set()
    for name, overrides in named:
        path = folder / name
        if (path / "metrics.csv").exists():
            continue
        missing.add(path)
        why = "no folder" if not path.is_dir() else f"no metrics.csv{_error_of(path)}"
        found.remarks.append(f"{path}: missing ({overrides}): {why}")
    return missing


def _error_of(folder: Path) -> str:
    try:
        error = read_json(folder / "summary.json").get("error")
    except UnreadableError:
        return ""
    return f", {_one_line(error)}" if error else ""


def _one_line(text: Any) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 300 else words[:297] + "..."


def read_run(folder: Path, name: str) -> tuple[Run | None, list[str]]:
    """A run, or None where nothing of it can be used, and a remark on each thing amiss."""
    remarks: list[str] = []

    def attempt(read: Any, file: str, otherwise: Any) -> Any:
        try:
            return read(folder / file)
        except UnreadableError as error:
            remarks.append(f"{folder}: {error}")
            return otherwise

    summary = attempt(read_json, "summary.json", {})
    config = attempt(read_config, "config.yaml", {})
    sheet = attempt(read_sheet, "metrics.csv", Sheet({}, []))
    typed = attempt(read_yaml, "overrides.yaml", [])
    if sheet.cut:
        remarks.append(f"{folder}: a half-written line of metrics.csv was left out")
    if not config and summary:
        remarks.append(f"{folder}: no config.yaml: only what summary.json says is known of it")
    for key, short in SHARED.items():
        if key not in config and short in summary:
            config[key] = summary[short]
    if config.get("strategy.uses_alpha") is False:  # then it tells no runs apart
        config.pop("alpha", None)
    status = str(summary.get("status") or ("unknown" if summary else "unfinished"))
    times = [(folder / f).stat().st_mtime for f in (*MARKS, "samples.jsonl")
             if (folder / f).exists()]  # fmt: skip
    run = Run(
        folder, name, status, summary, config,
        tuple(map(str, typed)) if isinstance(typed, list) else (),
        sheet, (min(times, default=0.0), max(times, default=0.0)),
    )  # fmt: skip
    if "strategy.name" not in config:
        remarks.append(f"{folder}: neither config.yaml nor summary.json tells what it is; left out")
        return None, remarks
    remarks += [f"{folder}: {text}" for text in _amiss(run)]
    if not run.final and not sheet.rows:
        return None, remarks
    return run, remarks


def _amiss(run: Run) -> Iterator[str]:
    of = f" of {run.planned}" if run.planned is not None else ""
    error = run.summary.get("error")
    after = f"after {run.refills}{of} refills" + (f": {_one_line(error)}" if error else "")
    if not run.summary:
        yield f"no summary.json that can be read (still running, or killed) {after}"
    elif not run.finished:
        yield f"{run.status} {after}"
    if not run.sheet.rows:
        yield "metrics.csv is missing or empty" + ("" if run.final else "; left out")
    elif not run.final:
        yield "no val/ metrics of the policy: it was not evaluated"
    wrong = _not_finite(run)
    if wrong:
        yield f"values that are not finite numbers left out: {', '.join(sorted(wrong)[:6])}"


def _not_finite(run: Run) -> set[str]:
    wrong = set()
    for which in ("base", "final"):
        said = run.summary.get(which)
        if isinstance(said, dict):
            wrong |= {f"{which} {k}" for k in said if k not in numbers(said)}
    for metric, column in run.sheet.columns.items():
        texts = {row[column] for row in run.sheet.rows} - {""}
        # a number ends in a digit; nan and inf do not
        if any(number(t) is None for t in texts if not t[-1].isdigit()):
            wrong.add(metric)
    return wrong


def tracked(items: Iterable[Any], what: str) -> Iterator[Any]:
    """The items, with a progress bar once they have taken over two seconds."""
    listed = list(items)
    start, bar, task = time.perf_counter(), None, None
    try:
        for done, item in enumerate(listed):
            if bar is None and time.perf_counter() - start > BAR_AFTER_S:
                bar = Progress(transient=True, console=Console(stderr=True))
                bar.start()
                task = bar.add_task(what, total=len(listed))
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
