"""Curves against refills and the evidence of convergence; what all figures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from powerflow_lit.reporting.grouping import COLOURS, Group
from powerflow_lit.reporting.statistics import band
from powerflow_lit.reporting.verdicts import ON_POLICY, SPREAD

TITLES = {
    "rollout/length_mean": "response length (tokens)",
    "val/length_mean": "response length (tokens)",
    "val/pass@1": "pass@1",
    "rollout/repetition": "4-gram repetition",
    "val/repetition": "4-gram repetition",
    "rollout/format_rate": "share with the format",
    "val/format_rate": "share with the format",
    "rollout/accuracy": "accuracy of rollouts",
    "val/quality": "validity",
    "val/modes@16": "modes among 16 samples",
    "val/unique_valid@16": "unique valid among 16 samples",
    SPREAD: "residual spread on base samples",
}
LENGTHS = ("rollout/length_mean", "val/length_mean")  # a chosen length is a line across
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9.5,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
}  # fmt: skip
UNKNOWN = "#7F7F7F"  # a strategy without a colour of its own
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
SHADES = (0.0, 0.4, -0.35, 0.6, -0.55, 0.2)  # towards white (above 0) or black
COLUMNS = 3  # panels side by side, where rows do not mean anything
MOST_ROWS = 12  # of small multiples
MOST_NAMES = 24  # in a legend
OUTLINE = [effects.Stroke(linewidth=3.0, foreground="#555555"), effects.Normal()]


@dataclass(frozen=True)
class Style:
    """How a group is drawn in every figure."""

    colour: str
    line: Any
    marker: str

    def drawn(self, **more: Any) -> dict[str, Any]:
        """Arguments of `plot`; yellow gets an outline, or it is lost on white."""
        outline = {"path_effects": OUTLINE} if self.colour == COLOURS["tb_token_per_token"] else {}
        return {"color": self.colour, "linestyle": self.line, **outline, **more}


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """By label: the strategy's colour; line, marker and shade tell its groups apart.

    The same values of the other keys get the same line in every strategy.
    """
    others = list(dict.fromkeys(g.rest for g in groups))
    found, within = {}, dict.fromkeys((g.strategy for g in groups), 0)
    for g in groups:
        place = others.index(g.rest) if len(others) <= len(SHADES) else within[g.strategy]
        within[g.strategy] += 1
        colour = shaded(COLOURS.get(g.strategy, UNKNOWN), SHADES[place % len(SHADES)])
        found[g.label] = Style(colour, LINES[place % len(LINES)], MARKERS[place % len(MARKERS)])
    return found


def shaded(colour: str, share: float) -> str:
    """The colour moved towards white (share above 0) or black."""
    end = 1.0 if share > 0 else 0.0
    red, green, blue = (c + (end - c) * abs(share) for c in to_rgb(colour))
    return to_hex((red, green, blue)).upper()


def title_of(metric: str) -> str:
    """What a panel is called."""
    return TITLES.get(metric, metric)


def draw_curves(
    rows: Sequence[tuple[str, Sequence[Group]]], metrics: Sequence[str], smooth: int
) -> Figure:
    """A panel for each metric: mean over the runs of a group, band from least to greatest.

    Args:
        rows: (title, groups); a single row is broken into lines of three panels.
    """
    if len(rows) == 1:
        across = min(COLUMNS, len(metrics))
        down = math.ceil(len(metrics) / across)
        cells = [(rows[0], m) for m in metrics]
    else:
        across, down = len(metrics), len(rows)
        cells = [(row, m) for row in rows for m in metrics]
    figure, axes = grid(down, across, sharey="col" if len(rows) > 1 else False)
    looks = styles(_unique(g for _, groups in rows for g in groups))
    for axis, ((name, groups), metric) in zip(axes, cells, strict=False):
        for g in groups:
            _draw_group(axis, g, metric, looks[g.label], smooth)
        axis.set_title(title_of(metric))
        axis.set_xlabel("refill")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if name and metric == metrics[0]:
            axis.set_ylabel(name, fontweight="bold", fontsize=11)
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    legend(figure, _entries(rows, looks))
    return figure


def _draw_group(axis: Axes, g: Group, metric: str, look: Style, smooth: int) -> None:
    counted = [r for r in g.counted if r.finished]
    refills, means, least, greatest = band([r.curve(metric) for r in counted], smooth)
    if refills:
        mark = look.marker if len(refills) <= 15 else ""
        axis.plot(refills, means, marker=mark, markersize=4.5, **look.drawn())
        if len(counted) > 1:
            axis.fill_between(refills, least, greatest, color=look.colour, alpha=0.18, linewidth=0)
    chosen = [t for r in counted if (t := r.last("train/length_target")) is not None]
    if chosen and metric in LENGTHS:
        axis.axhline(sum(chosen) / len(chosen), **look.drawn(linestyle=":", linewidth=1.0))
    for run in g.runs:
        if not run.finished:  # drawn thin and to its end, and never part of a mean
            refills, values, _, _ = band([run.curve(metric)], smooth)
            if refills:
                axis.plot(refills, values, **look.drawn(linewidth=0.9, alpha=0.8))
                axis.plot(refills[-1], values[-1], "x", color=look.colour, markersize=6)


def _entries(
    rows: Sequence[tuple[str, Sequence[Group]]], looks: Mapping[str, Style]
) -> list[tuple[Line2D, str]]:
    counts: dict[str, list[str]] = {}
    for _, groups in rows:
        for g in groups:
            counts.setdefault(g.label, []).append(g.count)
    found = []
    for label, said in counts.items():
        runs = " / ".join(dict.fromkeys(said))
        line = Line2D([], [], marker=looks[label].marker, markersize=4.5, **looks[label].drawn())
        found.append((line, f"{label}, {counted(runs)}"))
    return found


def counted(count: str) -> str:
    """`1 seed`, `3 seeds`; what tells of unfinished runs stays as it is."""
    return f"{count} seed{'' if count == '1' else 's'}" if count.isdigit() else count


def draw_convergence(groups: Sequence[Group]) -> tuple[Figure | None, str]:
    """A row for each group: log Z, residual spread, health of the importance weights.

    Returns:
        the figure (None where no run has any of it), and which groups found no place in it.
    """
    columns = [
        ("log Z (solid), closed form of the group (black)", "train/log_z", "train/log_z_group"),
        ("residual spread on base samples, on own (black)", SPREAD, ON_POLICY),
        ("effective sample size, share clipped (black)", "train/ess", "train/is_clip_frac"),
    ]
    seen = [c for c in columns if any(g.runs[0].metrics & {c[1], c[2]} for g in groups)]
    if not seen:
        return None, ""
    shown = list(groups)[:MOST_ROWS]
    figure, axes = grid(len(shown), len(seen), height=2.4)
    looks = styles(groups)
    for row, g in enumerate(shown):
        for column, (title, main, other) in enumerate(seen):
            axis = axes[row * len(seen) + column]
            look = Style(COLOURS.get(g.strategy, UNKNOWN), "-", looks[g.label].marker)
            for metric, drawn in ((other, Style("#222222", "--", "")), (main, look)):
                _draw_pair(axis, g, metric, drawn)
            if row == 0:
                axis.set_title(title, fontsize=10)
            if row == len(shown) - 1:
                axis.set_xlabel("refill")
            if column == 1:
                axis.set_ylim(bottom=0)
            if column == 0:
                axis.set_ylabel(folded(g.label), fontweight="bold", fontsize=9.5)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    figure.tight_layout()
    left = len(groups) - len(shown)
    return figure, f"{left} more groups not drawn (choose with where=)" if left else ""


def _draw_pair(axis: Axes, g: Group, metric: str, look: Style) -> None:
    refills, means, least, greatest = band([r.curve(metric) for r in g.counted])
    if refills:
        axis.plot(refills, means, **look.drawn())
        axis.fill_between(refills, least, greatest, color=look.colour, alpha=0.18, linewidth=0)


def folded(label: str, width: int = 22) -> str:
    """A label broken at spaces into lines of about so many characters."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def grid(
    down: int, across: int, *, height: float = 3.3, width: float = 4.4, sharey: Any = False
) -> tuple[Figure, list[Axes]]:
    """Panels row by row."""
    size = (max(width * across, 5.0), height * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def legend(figure: Figure, entries: Sequence[tuple[Any, str]]) -> None:
    """One legend below the panels, in as many columns as fit; the panels make room for it."""
    named = list(entries)[:MOST_NAMES]
    if len(entries) > MOST_NAMES:
        named.append((Line2D([], [], color="none"), f"and {len(entries) - MOST_NAMES} more"))
    if not named:
        figure.tight_layout()
        return
    wide, high = figure.get_size_inches()
    longest = max(len(text) for _, text in named)
    columns = max(1, min(len(named), int(wide / (0.075 * longest + 0.65))))
    room = 0.21 * math.ceil(len(named) / columns) + 0.15  # inches
    figure.set_size_inches(wide, high + room)
    figure.tight_layout(rect=(0, room / (high + room), 1, 1))
    handles, labels = zip(*named, strict=True)
    figure.legend(handles, labels, loc="lower center", ncol=columns, frameon=False)


def save(figure: Figure, path: Path, dpi: int) -> Path:
    """The figure as a PNG file."""
    figure.savefig(path, dpi=dpi, facecolor="white")
    plt.close(figure)
    return path


def _unique(groups: Iterable[Group]) -> list[Group]:
    return list({g.label: g for g in groups}.values())
