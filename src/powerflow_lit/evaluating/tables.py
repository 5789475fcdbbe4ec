"""What `powerflow_lit.evaluate` prints at its end, the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from powerflow_lit.console import FINAL
from powerflow_lit.evaluating.session import headline
from powerflow_lit.published import CREATIVE, REASONING, Published, published

# pass@1 is the mean of avg@k
SHOWN = (
    *(name for name in FINAL if name != "pass@1"), "truncated_frac", "mh_acceptance",
    "vs_parse_failures",
)  # fmt: skip
PLAIN = ("length_mean",)
WIDE = 5  # columns beside each other
NEWLINE = "\n"


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
    """Metrics as rows, samplers as columns; the paper's too, where no table of all has them."""
    first = next(iter(results.values()))
    counts = {r["samples_per_prompt"] for r in results.values()}
    few = ", greedy 1" if counts - {max(counts)} == {1} else ""
    table = Table(
        title=f"{name}: {record['model']}, {first['prompts']} prompts, k = {max(counts)}{few}",
        caption=f"diversity_semantic by {record['embedder']}",
        title_justify="left",
        caption_justify="left",
    )
    alone = len(record["benchmarks"]) == 1
    paper = _paper_of_benchmark(name, record["paper_name"]) if alone else {}
    _columns(table, "metric", list(results), list(paper))
    high = len(results) + len(paper) > WIDE
    for wanted in SHOWN:
        # of k samples: each sampler's own k
        names = [
            f"val/{wanted}{r['samples_per_prompt']}" if wanted[-1] == "@" else f"val/{wanted}"
            for r in results.values()
        ]
        theirs = [
            next((v for n, v in row.items() if f"val/{wanted}" == n or n in names), None)
            for row in paper.values()
        ]
        known = [n in r["metrics"] for n, r in zip(names, results.values(), strict=True)]
        if any(known) or any(t is not None for t in theirs):
            cells = [_cell(r, n, high) for n, r in zip(names, results.values(), strict=True)]
            shown = ["-" if t is None else f"{t:.3f}" for t in theirs]
            table.add_row(wanted + "k" * (wanted[-1] == "@"), *cells, *shown)
    return table


def _columns(table: Table, first: str, samplers: Sequence[str], methods: Sequence[str]) -> None:
    table.add_column(first, no_wrap=True)
    for sampler in samplers:
        table.add_column(sampler.replace("_", " "), justify="right")  # so that it breaks at words
    for method in methods:
        table.add_column(f"paper: {method}", justify="right", style="dim")


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
    _columns(table, "benchmark", samplers, methods)
    high = len(samplers) + len(methods) > WIDE
    for name, results in benchmarks.items():
        cells = [_percent(results.get(s), high) for s in samplers]
        table.add_row(name, *cells, *_theirs(paper, methods, name))
    if record["averages"]:
        cells = [_percent(record["averages"].get(s), high) for s in samplers]
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


def _percent(result: Mapping[str, Any] | None, high: bool) -> str:
    name = headline(result["metrics"]) if result else None
    return "-" if result is None or name is None else _cell(result, name, high, 100, 1)


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


def _cell(
    result: Mapping[str, Any], metric: str, high: bool, scale: float = 1, digits: int = 3
) -> str:
    """A figure and its interval, below it where the table is wide."""
    value = result["metrics"].get(metric)
    if value is None:
        return "-"
    digits = 1 if metric.removeprefix("val/") in PLAIN else digits
    text = f"{scale * value:.{digits}f}"
    if metric in result["intervals"]:
        low, top = (scale * bound for bound in result["intervals"][metric])
        text += f"{NEWLINE if high else ' '}[{low:.{digits}f}, {top:.{digits}f}]"
    return text
