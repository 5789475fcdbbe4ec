"""One engine session: every benchmark under every sampler, each pair kept when it is whole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from powerflow_lit.config.schema import BootstrapConfig
from powerflow_lit.console import wide_console
from powerflow_lit.evaluating.benchmarks import Benchmark
from powerflow_lit.evaluating.record import Record
from powerflow_lit.evaluating.scores import (
    AVG,
    Scored,
    average_interval,
    score,
    summary,
)
from powerflow_lit.judging.assessors import Assessor
from powerflow_lit.run_folder import read_problems
from powerflow_lit.samplers import Draws, EvaluationSettings, Policy, Sampler

HEADLINES = ("val/avg@", "val/quality", "val/pass@1")


def evaluate_all(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    samplers: Mapping[str, Sampler],
    settings: EvaluationSettings,
    record: Record,
    assessor: Assessor | None,
    intervals: BootstrapConfig,
) -> None:
    """Sample and score what the record does not hold yet; a line is printed for each pair."""
    for benchmark in benchmarks:
        for name, sampler in samplers.items():
            if record.has(benchmark.name, name):
                print(_line(benchmark.name, name, record.result(benchmark.name, name), "before"))
                continue
            draws, scored, seconds = _pair(policy, benchmark, name, sampler, settings, assessor)
            facts = {
                "samples_per_prompt": draws.samples_per_prompt,
                "prompts": len(benchmark.prompts),
                "seconds": round(seconds, 2),
                "tokens": draws.tokens,
            }
            for note in draws.notes:
                record.note(f"{benchmark.name}, {name}: {note}")
            figures = summary(scored.figures, **vars(intervals))
            ids = [p.id for p in benchmark.prompts]
            record.add(benchmark.name, name, ids, scored, figures, facts)
            print(_line(benchmark.name, name, record.result(benchmark.name, name)))


def _pair(
    policy: Policy,
    benchmark: Benchmark,
    name: str,
    sampler: Sampler,
    settings: EvaluationSettings,
    assessor: Assessor | None,
) -> tuple[Draws, Scored, float]:
    """A benchmark's draws under a sampler and their scores, and the seconds both took."""
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), "{task.fields[note]}",
               TimeRemainingColumn())  # fmt: skip
    console = wide_console()
    live = console.is_terminal  # elsewhere a bar leaves an empty line
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        title = f"{benchmark.name} {name}"
        bar = progress.add_task(title, total=None, note="")

        def show(phase: str, done: int, total: int, note: str = "") -> None:
            note = f"{done}/{total}{note}"
            progress.update(bar, description=phase, completed=done, total=total, note=note)

        def sampling(done: int, total: int, tokens: int) -> None:
            speed = tokens / max(time.perf_counter() - started, 1e-3)
            show(title, done, total, f"  {speed:,.0f} tok/s")

        draws = sampler.sample(policy, benchmark.prompts, benchmark.prompt_ids, settings, sampling)
        scored = score(benchmark, draws, assessor, lambda phase, *n: show(f"{title}: {phase}", *n))
    return draws, scored, time.perf_counter() - started


def averages(
    record: Record, benchmarks: Sequence[str], samplers: Sequence[str], intervals: BootstrapConfig
) -> dict[str, Any]:
    """The plain mean of avg@k over several benchmarks, by sampler, as the paper's column Avg."""
    found: dict[str, Any] = {}
    if len(benchmarks) < 2:
        return found
    rows = read_problems(record.folder)
    for sampler in samplers:
        results = [record.result(b, sampler) for b in benchmarks]
        shared = set.intersection(*(set(r["metrics"]) for r in results))
        for metric in sorted(n for n in shared if AVG.fullmatch(n)):
            column = metric.removeprefix("val/")
            values = [
                np.array([float(r[column] or "nan") for r in rows
                          if r["benchmark"] == b and r["decoding"] == sampler])
                for b in benchmarks
            ]  # fmt: skip
            values = [own[np.isfinite(own)] for own in values]
            errors = [r["sampling_errors"].get(metric) for r in results]
            own = found.setdefault(
                sampler,
                {"benchmarks": list(benchmarks), "metrics": {}, "intervals": {},
                 "sampling_errors": {}},
            )  # fmt: skip
            own["metrics"][metric] = float(np.mean([r["metrics"][metric] for r in results]))
            own["intervals"][metric] = average_interval(values, **vars(intervals))
            if None not in errors:
                total = sum(e**2 for e in errors if e is not None)
                own["sampling_errors"][metric] = float(np.sqrt(total)) / len(errors)
    return found


def headline(metrics: Mapping[str, float]) -> str | None:
    """The metric to name first: avg@k of the largest k, or quality, or pass@1."""
    for wanted in HEADLINES:
        hits = [n for n in metrics if n == wanted or (wanted[-1] == "@" and n.startswith(wanted))]
        if hits:
            return max(hits, key=lambda n: int(n.rpartition("@")[2]) if "@" in wanted[-1] else 0)
    return next(iter(metrics), None)


def _line(benchmark: str, sampler: str, result: Mapping[str, Any], when: str = "") -> str:
    name = headline(result["metrics"])
    figure = "no figures"
    if name is not None:
        figure = f"{name.removeprefix('val/')} {result['metrics'][name]:.3f}"
    if name in result["intervals"]:
        low, high = result["intervals"][name]
        figure += f" [{low:.3f}, {high:.3f}]"
    seconds = "evaluated before" if when else f"{result['seconds']:.0f} s"
    return f"{benchmark:14}  {sampler:16}  {figure}  {result['tokens']:,} tokens  {seconds}"
