"""What `powerflow_lit.evaluate` prints at its end, the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from powerflow_lit.console import FINAL
from powerflow_lit.evaluating.session import headline
from powerflow_lit.published import CREATIVE, REASONING, Published, published

SHOWN = (*FINAL, "truncated_frac", "mh_acceptance", "vs_parse_failures")
PLAIN = ("length_mean",)


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """A table for each benchmark, one of all benchmarks, and the calibration."""
    made = [
        _benchmark(name, results, record)
        for name, results in record["benchmarks"].items()
        if results
    ]
    together = _together(record)
    calibration = record["calibration"]
    return [
        *made,
        *([together] if together else []),
        *([_calibration(calibration)] if calibration else []),
    ]


def _benchmark(name: str, results: Mapping[str, Any], record: Mapping[str, Any]) -> Table:
    """Metrics as rows, samplers as columns, then the paper's rows that name these metrics."""
    first = next(iter(results.values()))
    title = (
        f"{name}: {record['model']}, {first['prompts']} prompts"
        f" (semantic diversity by {record['embedder']})"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for sampler in results:
        table.add_column(sampler, justify="right")
    paper = _paper_of_benchmark(name, record["paper_name"])
    for method in paper:
        table.add_column(f"paper: {method}", justify="right", style="dim")
    known = list(dict.fromkeys(m for r in results.values() for m in r["metrics"]))
    known += [m for row in paper.values() for m in row if m not in known]
    for metric in _shown(known):
        cells = [_cell(r, metric) for r in results.values()]
        theirs = [f"{row[metric]:.3f}" if metric in row else "-" for row in paper.values()]
        table.add_row(metric.removeprefix("val/"), *cells, *theirs)
    return table


def _paper_of_benchmark(name: str, model: str | None) -> dict[str, dict[str, float]]:
    """The paper's figures of a benchmark in 0..1, by method and `val/` metric."""
    reasoning, creative = published(REASONING, model), published(CREATIVE, model)
    if reasoning is not None and reasoning.metric is not None:
        return {
            method: {reasoning.metric: row[name] / 100}
            for method, row in reasoning.rows.items()
            if name in row
        }
    if creative is not None and name.startswith("creative"):
        return {
            method: {f"val/{metric}": value for metric, value in row.items()}
            for method, row in creative.rows.items()
        }
    return {}


def _together(record: Mapping[str, Any]) -> Table | None:
    """The headline in percent, a row for each benchmark and for the average; None for one alone."""
    benchmarks: Mapping[str, Any] = record["benchmarks"]
    paper = published(REASONING, record["paper_name"])
    if len(benchmarks) < 2:
        return None
    samplers = list(dict.fromkeys(s for results in benchmarks.values() for s in results))
    methods = list(paper.rows) if paper else []
    table = Table(title=f"{record['model']}: percent", title_justify="left")
    table.add_column("benchmark")
    for sampler in samplers:
        table.add_column(sampler, justify="right")
    for method in methods:
        table.add_column(f"paper: {method}", justify="right", style="dim")
    for name, results in benchmarks.items():
        cells = [_percent(results.get(s)) for s in samplers]
        table.add_row(name, *cells, *_theirs(paper, methods, name))
    if record["averages"]:
        cells = [_percent(record["averages"].get(s)) for s in samplers]
        whole = paper is not None and set(benchmarks) == _benchmarks_of(paper)
        # a mean over other benchmarks does not compare with the paper's
        theirs = _theirs(paper, methods, "average") if whole else ["-"] * len(methods)
        table.add_section()
        table.add_row("average", *cells, *theirs)
    return table


def _benchmarks_of(paper: Published) -> set[str]:
    return {name for row in paper.rows.values() for name in row} - {"average"}


def _theirs(paper: Published | None, methods: Sequence[str], name: str) -> list[str]:
    rows = paper.rows if paper else {}
    return [f"{rows[m][name]:.1f}" if name in rows[m] else "-" for m in methods]


def _percent(result: Mapping[str, Any] | None) -> str:
    name = headline(result["metrics"]) if result else None
    if result is None or name is None:
        return "-"
    text = f"{100 * result['metrics'][name]:.1f}"
    if name in result["intervals"]:
        low, high = result["intervals"][name]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def _calibration(found: Mapping[str, Any]) -> Table:
    title = (
        f"calibration: {found['sampler']} against the paper's {found['method']} row of "
        f"{found['paper_name']}, in points: {found['verdict']}"
    )
    caption = "\n".join(found["caveats"])
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("benchmark", "metric", "ours", "paper", "allowed", "verdict"):
        table.add_column(column, justify="left" if column in ("benchmark", "metric") else "right")
    for check in found["checks"]:
        ours, allowed = check["ours"], check["allowed"]
        table.add_row(
            check["benchmark"],
            check["metric"].removeprefix("val/"),
            "-" if ours is None else f"{ours:.2f}",
            f"{check['published']:.2f}",
            "-" if allowed is None else f"± {allowed:.2f}",
            check["verdict"],
        )
    return table


def _shown(metrics: Sequence[str]) -> list[str]:
    """Metrics worth a row, in the order of `SHOWN`; of pass@k the ends of the curve."""
    names = [m.removeprefix("val/") for m in metrics]
    sizes = {n.rpartition("@")[2] for n in names if n.startswith("avg@")}
    found: list[str] = []
    for wanted in SHOWN:
        for name in names:
            at_k = wanted.endswith("@") and name.startswith(wanted)
            inner = name.startswith("pass@") and name.rpartition("@")[2] not in {*sizes, "1"}
            if (name == wanted or at_k) and not inner and f"val/{name}" not in found:
                found.append(f"val/{name}")
    return found


def _cell(result: Mapping[str, Any], metric: str) -> str:
    value = result["metrics"].get(metric)
    if value is None:
        return "-"
    digits = 1 if metric.removeprefix("val/") in PLAIN else 3
    text = f"{value:.{digits}f}"
    if metric in result["intervals"]:
        low, high = result["intervals"][metric]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text
