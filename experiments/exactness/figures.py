"""Figures and tables of the exactness study, from its rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from powerflow_lit.reporting.grouping import COLOURS

Row = Mapping[str, Any]
SAMPLED = "samples"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.fontsize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLOUR = {**COLOURS, "tb_token_power": "#000000"}
LABEL = {"tb_token": "tb_token (energy)", "tb_token_power": "tb_token (power)"}
FLOOR = 1e-6  # below it lies rounding
DEFAULT_BASE = 1
Curve = tuple[list[int], list[list[float]]]  # steps, and at each the values of the seeds


def pick(rows: Iterable[Row], **wanted: object) -> list[Row]:
    wanted = {"variant": "", "base": DEFAULT_BASE, **wanted}
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def curve(rows: Sequence[Row], column: str) -> Curve:
    steps = sorted({r["step"] for r in rows})
    return steps, [[r[column] for r in rows if r["step"] == s] for s in steps]


def plot(axis: Axes, rows: Sequence[Row], column: str, **style: Any) -> None:
    """The mean over seeds, and a band from least to greatest."""
    steps, values = curve(rows, column)
    if not steps:
        return
    floor = FLOOR if axis.get_yscale() == "log" else float("-inf")
    axis.plot(steps, [max(mean(v), floor) for v in values], **style)
    if len(values[0]) > 1:
        low = [max(min(v), floor) for v in values]
        axis.fill_between(steps, low, [max(*v, floor) for v in values],
                          color=style["color"], alpha=0.2, linewidth=0)  # fmt: skip


# --- figures -------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], folder: Path) -> None:
    with plt.rc_context(STYLE):
        for name, figure in (
            ("total_variation", distances(rows)),
            ("log_z", constants(rows)),
            ("failures", failures(rows)),
        ):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            with Image.open(path) as image:  # 256 colours are plenty and a third of the size
                image.convert("RGB").quantize(256).save(path, optimize=True)


def distances(rows: Sequence[Row]) -> plt.Figure:
    """Total variation to the own target: all strings above, own samples below."""
    alphas = sorted({r["alpha"] for r in rows})
    figure, axes = plt.subplots(2, len(alphas), figsize=(10.5, 6.8), sharex=True, sharey="row")
    names = list(dict.fromkeys(r["objective"] for r in rows))
    for column, alpha in enumerate(alphas):
        above, below = axes[0][column], axes[1][column]
        for axis in (above, below):
            axis.set_yscale("log")
        for name in names:
            # la_tb is dashed over powerflow, which it nearly repeats
            style = {"color": COLOUR[name], "linewidth": 1.8}
            dash = (0, (4, 3)) if name == "la_tb" else "-"
            of = pick(rows, objective=name, alpha=alpha)
            for sampling, line in (("base", dash), ("policy", dash), ("uniform", ":")):
                plot(above, pick(of, sampling=sampling), "total_variation", linestyle=line, **style)
            plot(below, pick(of, sampling=SAMPLED), "total_variation", linestyle=dash, **style)
        above.set_title(f"α = {alpha:g}, all strings")
        below.set_title(f"α = {alpha:g}, own samples")
        below.set_xlabel("optimiser step")
    for row in axes:
        row[0].set_ylabel("total variation to the exact target")
    handles = [
        plt.Line2D([], [], color=COLOUR[n], linewidth=1.8, label=LABEL.get(n, n),
                   linestyle=(0, (4, 3)) if n == "la_tb" else "-")
        for n in names
    ]  # fmt: skip
    handles.append(plt.Line2D([], [], color="0.4", linestyle=":", label="above: uniform weights"))
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def constants(rows: Sequence[Row]) -> plt.Figure:
    """log Z' of PowerFlow beside its exact value; the error of every learned log Z."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    colour = COLOUR["powerflow"]
    for alpha in sorted({r["alpha"] for r in rows}):
        of = pick(rows, objective="powerflow", alpha=alpha)
        plot(left, pick(of, sampling=SAMPLED), "log_z", color=colour)
        plot(left, pick(of, sampling="base"), "log_z", color=colour, linestyle=":")
        exact, last = of[0]["log_z_exact"], max(r["step"] for r in of)
        left.axhline(exact, color="black", linestyle=(0, (4, 3)), linewidth=1)
        left.annotate(f"α = {alpha:g}: {exact:.3f}", (last, exact), xytext=(0, 4),
                      textcoords="offset points", ha="right")  # fmt: skip
    for label, line, shade in (
        ("own samples", "-", colour),
        ("all strings, by base", ":", colour),
        ("exact", (0, (4, 3)), "black"),
    ):
        left.plot([], [], color=shade, linestyle=line, label=label)
    left.set_title("powerflow: log Z′ learned and exact (nats per token)")
    left.legend(frameon=False, loc="center right")
    right.set_yscale("log")
    for name in dict.fromkeys(r["objective"] for r in rows):
        of = pick(rows, objective=name, alpha=4.0, sampling=SAMPLED)
        errors = [{**r, "error": abs(r["log_z"] - r["log_z_exact"])} for r in of if learned(r)]
        plot(right, errors, "error", color=COLOUR[name], label=LABEL.get(name, name),
             linestyle=(0, (4, 3)) if name == "la_tb" else "-")  # fmt: skip
    right.set_title("α = 4, own samples: |learned − exact|")
    right.legend([x for x in right.get_lines() if x.get_label()[0] != "_"],
                 [x.get_label() for x in right.get_lines() if x.get_label()[0] != "_"],
                 frameon=False)  # fmt: skip
    for axis in (left, right):
        axis.set_xlabel("optimiser step")
    figure.tight_layout()
    return figure


def learned(row: Row) -> bool:
    return row["log_z"] is not None


def failures(rows: Sequence[Row]) -> plt.Figure:
    """A frozen policy beside one that converges, in three numbers; and log Z' frozen at zero."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.2))
    panels = (
        (axes[0][0], "total_variation", "total variation to the exact target", "log"),
        (axes[0][1], "loss", "loss on own samples", "log"),
        (axes[1][0], "residual_std_on_base", "residual's spread on base samples (nats/token)", ""),
    )
    converging = pick(rows, objective="la_tb", alpha=4.0, sampling=SAMPLED)
    frozen = pick(rows, objective="la_tb", alpha=4.0, sampling=SAMPLED, variant="fast")
    for axis, column, title, scale in panels:
        if scale:
            axis.set_yscale(scale)
        plot(axis, converging, column, color=COLOUR["powerflow"], label="lr .02, of log Z′ .1")
        plot(axis, frozen, column, color=COLOUR["tb_traj"], label="lr .5, of log Z′ .01")
        axis.set_title(f"la_tb, α = 4: {title}")
    axes[0][0].legend(frameon=False)
    axes[1][0].set_ylim(bottom=0)
    zero = axes[1][1]
    zero.set_yscale("log")
    zero.set_ylim(3e-3, 1.2)
    shades = {0.5: COLOUR["rl_token"], 2.0: COLOUR["tb_token"], 4.0: COLOUR["rl_traj"]}
    for alpha, colour in shades.items():
        of = pick(rows, objective="la_tb", alpha=alpha, sampling=SAMPLED, variant="log_z=0")
        plot(zero, of, "total_variation", color=colour, linestyle=(0, (4, 3)))
        plot(zero, of, "total_variation_to_tilt", color=colour, label=f"α = {alpha:g}")
    for line, label in (((0, (4, 3)), "to the LA-TB target"), ("-", r"to $p^\alpha e^{cL^2}$")):
        zero.plot([], [], color="0.4", linestyle=line, label=label)
    zero.set_title("la_tb, log Z′ held at 0: total variation")
    zero.legend(frameon=False, ncol=2, loc="lower left")
    for axis in axes.flat:
        axis.set_xlabel("optimiser step")
    figure.tight_layout()
    return figure


# --- tables --------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return "-"
    tail = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{tail}"


def at_end(rows: Sequence[Row], column: str) -> list[float]:
    last = max((r["step"] for r in rows), default=0)
    return [r[column] for r in rows if r["step"] == last and r[column] is not None]


def final_table(rows: Sequence[Row]) -> str:
    """Markdown: total variation at the end, mean ± standard deviation over seeds."""
    head = ("objective", "α", "at start", "uniform", "by base", "by policy", "own samples",
            "log Z (samples)", "exact")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    variants = [(n, "") for n in dict.fromkeys(r["objective"] for r in rows)]
    for name, variant in [*variants, ("la_tb", "log_z=0")]:
        for alpha in sorted({r["alpha"] for r in rows}):
            of = pick(rows, objective=name, alpha=alpha, variant=variant)
            if not of:
                continue
            columns = ["total_variation"]
            if variant:
                columns.append("total_variation_to_tilt")
            for column in columns:
                title = f"{name}, {variant}" if variant else name
                title += ", to p^α exp(cL²)" if column != "total_variation" else ""
                sampled = pick(of, sampling=SAMPLED, variant=variant)
                start = [r[column] for r in sampled if r["step"] == 0]
                ends = [
                    spread(at_end(pick(of, sampling=s, variant=variant), column))
                    for s in ("uniform", "base", "policy", SAMPLED)
                ]
                exact = at_end(sampled, "log_z_exact")
                cells = [title, f"{alpha:g}", f"{start[0]:.3f}", *ends,
                         spread(at_end(sampled, "log_z"), 3),
                         f"{exact[0]:.3f}" if exact else "-"]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def frozen_table(rows: Sequence[Row]) -> str:
    """Markdown: the two pairs of rates on every base, la_tb at α = 4 on own samples."""
    head = ("base", "rates", "TV at start", "TV at end", "loss at end", "spread on base")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for base in sorted({r["base"] for r in rows}):
        for variant, title in (("", "fitting"), ("fast", "policy fast, log Z′ slow")):
            of = pick(rows, objective="la_tb", alpha=4.0, sampling=SAMPLED, base=base,
                      variant=variant)  # fmt: skip
            start = [r["total_variation"] for r in of if r["step"] == 0]
            losses = at_end(of, "loss")
            cells = [str(base), title, f"{start[0]:.3f}",
                     spread(at_end(of, "total_variation"), 3),
                     f"{min(losses):.0e} to {max(losses):.0e}",
                     spread(at_end(of, "residual_std_on_base"), 2)]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
