"""The report's files: figures, tables and the page that holds them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.reporting import evaluations as evaluated
from powerflow_lit.reporting import page as html
from powerflow_lit.reporting import provenance, tables
from powerflow_lit.reporting.figures import (
    MOST_NAMES,
    STYLE,
    UNKNOWN,
    draw_convergence,
    draw_curves,
    save,
)
from powerflow_lit.reporting.grouping import COLOURS, group, known_key, sortable
from powerflow_lit.reporting.points import draw_frontier, draw_ladder, draw_pass_at_k
from powerflow_lit.reporting.runs import tracked
from powerflow_lit.reporting.study import Study
from powerflow_lit.reporting.tables import Row
from powerflow_lit.reporting.verdicts import evidence, together, verdict

Drawn = dict[str, tuple[Path, str]]  # by kind of figure: file and caption


def write(study: Study, output: Path, command: str) -> str:
    """Everything into the output folder; returns the final table as markdown.

    Raises:
        ConfigError: a figure was asked for that cannot be drawn.
    """
    output.mkdir(parents=True, exist_ok=True)
    names, rows = tables.final_table(study.groups, study.config.table, study.config.bootstrap)
    drawn = draw_all(study, output, rows)
    text = ""
    if study.runs:
        text = tables.markdown(names, rows)
        tables.write_table_csv(output / "table.csv", names, rows)
        listed = [r for g in study.groups for r in sorted(g.runs, key=lambda r: sortable(r.seed))]
        tables.write_results(
            output / "results.csv", listed, study.keys, study.headline, study.aliases
        )
    more = evaluated.table_of(study.evaluations, study.config.table, study.config.bootstrap)
    if study.evaluations:
        text += ("\n" if text else "") + tables.markdown(*more, what="samples")
    if text:  # a mistyped folder must not empty the tables of an earlier report
        (output / "table.md").write_text(text)
    page = page_of(study, drawn, (names, rows), more, command)
    (output / "index.html").write_text(page.html(), encoding="utf-8")
    return text


def draw_all(study: Study, output: Path, rows: list[Row]) -> Drawn:
    """Every figure that the configuration and the runs call for."""
    plans: list[tuple[str, Callable[[], tuple[Figure | None, str]]]] = []
    if study.runs:
        plans.append(("curves", lambda: _curves(study)))
    if study.config.x is not None and study.runs:
        plans.append(("ladder", lambda: _ladder(study)))
    if study.config.scatter is not None and study.runs:
        plans.append(("frontier", lambda: _frontier(study, rows)))
    plans.append(("pass_at_k", lambda: _pass_at_k(study)))
    plans.append(("convergence", lambda: _convergence(study)))
    drawn: Drawn = {}
    with plt.rc_context(STYLE):
        for name, draw in tracked(plans, "drawing"):
            figure, caption = draw()
            if figure is not None:
                path = save(figure, output / f"{name}.png", study.config.dpi)
                drawn[name] = (path, caption)
    return drawn


def _curves(study: Study) -> tuple[Figure | None, str]:
    known = {m for r in study.runs for m in r.metrics}
    metrics = [m for m in study.config.metrics if m in known]
    absent = [m for m in study.config.metrics if m not in known]
    caption = "Curves against refills; refill 0 is the base."
    if absent:
        caption += f" No run has {', '.join(absent)}."
    if not metrics:
        study.remarks.append(f"no curves: no run has {', '.join(absent) or 'any metric asked for'}")
        return None, ""
    rows = [(p.name, group(p.runs, study.panel_keys, study.aliases)) for p in study.panels]
    return draw_curves(rows, metrics, study.config.smooth), caption


def _ladder(study: Study) -> tuple[Figure | None, str]:
    key = known_key(study.config.x or "", study.runs, "x")
    wanted = [study.headline, *study.config.metrics]
    metrics = [m for m in dict.fromkeys(wanted) if m and any(r.last(m) is not None
               for r in study.runs)]  # fmt: skip
    if not metrics:
        study.remarks.append(f"x={study.config.x}: no run has a final figure to draw")
        return None, ""
    figure = draw_ladder(study.runs, key, study.keys, metrics, study.aliases)
    return figure, f"Final figures against {key}: mean ± standard deviation over seeds."


def _frontier(study: Study, rows: list[Row]) -> tuple[Figure | None, str]:
    asked = study.config.scatter or {}
    if set(asked) != {"x", "y"}:
        raise ConfigError(f"scatter={asked}: give {{x: <metric>, y: <metric>}}")
    x, y = asked["x"], asked["y"]
    if not any(r.last(x) is not None and r.last(y) is not None for r in study.runs):
        study.remarks.append(f"scatter: no run has both {x} and {y}")
        return None, ""
    places = {(r.config.get("task.name"), r.config.get("model.name")) for r in study.runs}
    # several bases would be joined by one line
    decodings = tables.decodings_of(study.runs) if len(places) == 1 else {}
    figure = draw_frontier(study.groups, x, y, _intervals(rows), decodings)
    return figure, f"Final {x} and {y}: small dots are seeds; bars the interval over problems."


def _intervals(rows: list[Row]) -> Mapping[str, Mapping[str, tuple[float, float]]]:
    return {
        row.label: {
            f"val/{n}": (c.low, c.high) for n, c in row.cells.items() if not math.isnan(c.low)
        }
        for row in rows
    }


def _pass_at_k(study: Study) -> tuple[Figure | None, str]:
    lines = evaluated.pass_lines(study.evaluations, study.groups)
    if not lines:
        return None, ""
    caption = "Unbiased pass@k; bands: interval over problems."
    if len(lines) > MOST_NAMES:
        caption += f" {len(lines) - MOST_NAMES} more lines not drawn (choose with where=)."
    return draw_pass_at_k(lines[:MOST_NAMES], study.config.bootstrap), caption


def _convergence(study: Study) -> tuple[Figure | None, str]:
    figure, left = draw_convergence(study.groups)
    caption = (
        "log Z should come to rest on its closed form; the spread on base samples should fall. "
        "A small spread on own samples with none of that is a collapse. Runs that did not finish "
        "are drawn only where a group has no other."
    )
    return figure, f"{caption} {left}".strip()


def page_of(
    study: Study,
    drawn: Drawn,
    final: tuple[list[str], list[Row]],
    more: tuple[list[str], list[Row]],
    command: str,
) -> html.Page:
    """The page, section by section."""

    def pictures(*kinds: str) -> list[str]:
        return [html.figure(*drawn[k]) for k in kinds if k in drawn]

    page = html.Page(study.title, study.config.note)
    page.section("Warnings", html.warnings(study.remarks))
    page.section("Verdicts", *verdicts_of(study))
    page.section("Curves", *pictures("curves", "ladder", "frontier"))
    if study.runs:
        page.section("Final figures", html.table(*final))
    page.section(
        "Evaluations",
        html.table(*more, what="samples") if study.evaluations else "",
        *pictures("pass_at_k"),
    )
    page.section("Evidence of convergence", *pictures("convergence"))
    if study.runs:
        page.section(
            "What was run", html.facts(provenance.facts_of(study.groups, study.sweeps)),
            *(html.paragraph(n) for n in study.notes),
        )  # fmt: skip
    page.section(
        "How to reproduce",
        html.commands(provenance.train_commands(study.runs, study.sweeps), "The runs:"),
        html.commands([command], "This page:"),
    )
    return page


def verdicts_of(study: Study) -> list[str]:
    """A block for each group of runs."""
    blocks = []
    limits = study.config.verdict
    for g in study.groups:
        findings = [
            (f"seed {r.seed}", f)
            for r in g.runs
            for f in verdict(evidence(r, study.headline, limits.tail), limits)
        ]
        colour = COLOURS.get(g.strategy, UNKNOWN)
        blocks.append(html.verdict(g.label, g.count, colour, together(findings), len(g.runs)))
    return blocks
