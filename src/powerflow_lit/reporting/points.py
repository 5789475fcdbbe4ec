"""Figures of final values: ladders against a config key, frontiers of two metrics, pass@k."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from powerflow_lit.config.schema import BootstrapConfig
from powerflow_lit.metrics.bootstrap import bootstrap
from powerflow_lit.reporting.figures import Style, counted, grid, legend, styles, title_of
from powerflow_lit.reporting.files import number
from powerflow_lit.reporting.grouping import Group, group, short_key, short_value, sortable
from powerflow_lit.reporting.runs import Run
from powerflow_lit.reporting.statistics import deviation, mean, pass_at_k

BASE = "#222222"
LOOKS: tuple[tuple[str, Any, str, str], ...] = (  # of the base's decodings
    ("base, plain temperatures", "-", "o", BASE),
    ("base, min-p", "--", "s", "#777777"),
)
# where a name may stand beside its point: right, left, above or below
PLACES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DECODING = re.compile(r"T=(?P<t>[\d.]+)(?:,min_p=(?P<p>[\d.]+))?")


@dataclass(frozen=True)
class PassLine:
    """A line of the pass@k figure: correct samples of each problem, an array for each run."""

    label: str
    style: Style
    counts: Sequence[np.ndarray]  # (P,) each
    n: int


def draw_ladder(
    runs: Sequence[Run],
    key: str,
    keys: Sequence[str],
    metrics: Sequence[str],
    aliases: Mapping[str, str],
) -> Figure:
    """Final metrics against a config key: mean ± sd over seeds, a line for the other keys.

    Args:
        key: of the horizontal axis; `keys` all that vary.
    """
    lines = group(runs, [k for k in keys if k != key], aliases)
    looks = styles(lines)
    values = sorted({r.config.get(key) for r in runs}, key=sortable)
    place, log = _axis_of(values, key)
    across = min(len(metrics), 3)
    figure, axes = grid(math.ceil(len(metrics) / across), across, height=3.6)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, metrics, strict=False):
        for line in lines:
            at, means, spreads = [], [], []
            for point in group(line.runs, [key], aliases):
                finals = [f for r in point.counted if (f := r.last(metric)) is not None]
                if finals:
                    at.append(place[point.runs[0].config.get(key)])
                    means.append(mean(finals))
                    spreads.append(np.nan_to_num(deviation(finals)))
            look = looks[line.label]
            axis.errorbar(at, means, yerr=spreads, capsize=3, marker=look.marker, markersize=5,
                          **look.drawn())  # fmt: skip
        base = [b for r in runs if (b := r.first(metric)) is not None]
        if base:
            axis.axhline(mean(base), color=BASE, linestyle=(0, (4, 3)), linewidth=1.3)
        if log:
            axis.set_xscale("log")
        axis.set_xticks([place[v] for v in values], [short_value(v) for v in values])
        axis.minorticks_off()
        axis.set_xlabel(short_key(key, aliases))
        axis.set_title(title_of(metric))
    entries: list[tuple[Any, str]] = [
        (Line2D([], [], marker=looks[x.label].marker, **looks[x.label].drawn()), x.label)
        for x in lines
    ]
    entries.append((Line2D([], [], color=BASE, linestyle=(0, (4, 3))), "base, T=1"))
    legend(figure, entries)
    return figure


def _axis_of(values: Sequence[Any], key: str) -> tuple[dict[Any, float], bool]:
    """Where each value stands, and whether the axis is logarithmic."""
    found = [number(v) for v in values]
    real = [f for f in found if f is not None]
    if len(real) < len(found):
        return {v: float(i) for i, v in enumerate(values)}, False
    wide = min(real, default=0) > 0 and max(real) >= 16 * min(real)
    log = min(real, default=0) > 0 and (key == "alpha" or wide)
    return dict(zip(values, real, strict=True)), log


def draw_frontier(
    groups: Sequence[Group],
    x: str,
    y: str,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    decodings: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Final points of two metrics; the base's decodings as curves in order of temperature.

    Args:
        intervals: by label of the group and metric, drawn as error bars (else sd over seeds).
        decodings: `val/` metrics of the base by decoding, `T=1` among them.
    """
    figure, (axis,) = grid(1, 1, height=4.8, width=7.0)
    entries = _draw_decodings(axis, x, y, decodings)
    looks = styles(groups)
    for g in groups:
        dots = [(r.last(x), r.last(y)) for r in g.counted]
        points = [(a, b) for a, b in dots if a is not None and b is not None]
        if not points:
            continue
        look = looks[g.label]
        centre = [mean(side) for side in zip(*points, strict=True)]
        errors = [_error(c, [p[i] for p in points], intervals.get(g.label, {}).get(m))
                  for i, (c, m) in enumerate(zip(centre, (x, y), strict=True))]  # fmt: skip
        axis.plot(*zip(*points, strict=True), ".", color=look.colour, alpha=0.55, markersize=6)
        axis.errorbar(centre[0], centre[1], xerr=errors[0], yerr=errors[1], capsize=2.5,
                      color=look.colour, marker=look.marker, markersize=8, zorder=5,
                      markeredgecolor="white", linewidth=1.2)  # fmt: skip
        handle = Line2D([], [], color=look.colour, marker=look.marker, linestyle="")
        entries.append((handle, f"{g.label}, {counted(g.count)}"))
    axis.set_xlabel(title_of(x))
    axis.set_ylabel(title_of(y))
    axis.margins(0.1)
    legend(figure, entries)
    _name_decodings(axis, x, y, decodings)
    return figure


def _name_decodings(
    axis: Axes, x: str, y: str, decodings: Mapping[str, Mapping[str, float]]
) -> None:
    """Each decoding's name where it covers no earlier name and no point, else not at all."""
    inch = axis.figure.get_dpi()
    # inches, after the layout; lines by points along them
    drawn = [axis.transData.transform(line.get_xydata()) / inch for line in axis.lines]
    steps = np.linspace(0, 1, 40)[:, None]
    along = [a + steps * (b - a) for d in drawn for a, b in itertools.pairwise(d)]
    marks = np.concatenate([*drawn, *along]) if drawn else np.empty((0, 2))
    frame = axis.get_window_extent()
    edge = frame.x1 / inch
    taken: list[tuple[float, float, float, float]] = []
    plain, with_min_p = chains(decodings)
    for name in [*with_min_p, *plain]:
        if x not in decodings[name] or y not in decodings[name]:
            continue
        here = axis.transData.transform((decodings[name][x], decodings[name][y])) / inch
        text = name.replace(",min_p=", ", min-p ")
        wide, high = 0.085 * len(text), 0.14  # inches at 9 points
        for right, up in PLACES:
            left = here[0] + (0.07 if right > 0 else -0.07 - wide if right < 0 else -wide / 2)
            low = here[1] + (0.07 if up > 0 else -0.07 - high if up < 0 else -high / 2)
            box = (left, low, left + wide, low + high)
            covered = (
                box[2] > edge
                or any(_inside(m, box) for m in marks)
                or any(_overlap(box, t) for t in taken)
            )
            if not covered:
                taken.append(box)
                colour = LOOKS[1][3] if name in with_min_p else BASE
                at = axis.transData.inverted().transform((left * inch, low * inch))
                axis.text(at[0], at[1], text, fontsize=9, color=colour, va="bottom")
                break


def _inside(point: np.ndarray, box: tuple[float, float, float, float]) -> bool:
    return bool(box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _error(centre: float, values: list[float], interval: tuple[float, float] | None) -> Any:
    if interval is not None and np.all(np.isfinite(interval)):
        # an interval of percentiles may miss its mean by a rounding
        return [[max(centre - interval[0], 0.0)], [max(interval[1] - centre, 0.0)]]
    return np.nan_to_num(deviation(values))


def _draw_decodings(
    axis: Axes, x: str, y: str, decodings: Mapping[str, Mapping[str, float]]
) -> list[tuple[Any, str]]:
    entries: list[tuple[Any, str]] = []
    for (label, line, marker, colour), points in zip(LOOKS, chains(decodings), strict=True):
        drawn = [(n, d[x], d[y]) for n in points if x in (d := decodings[n]) and y in d]
        if not drawn:
            continue
        _, xs, ys = zip(*drawn, strict=True)
        axis.plot(xs, ys, line, marker=marker, color=colour, markersize=4, linewidth=1.3)
        entries.append((Line2D([], [], color=colour, linestyle=line, marker=marker), label))
        if label.endswith("temperatures") and "T=1" in points:
            at_one = decodings["T=1"]
            if x in at_one and y in at_one:
                axis.plot(at_one[x], at_one[y], "*", color=BASE, markersize=15, zorder=4)
                handle = Line2D([], [], color=BASE, marker="*", linestyle="", markersize=11)
                entries.append((handle, "base, T=1"))
    return entries


def chains(decodings: Sequence[str] | Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of plain decodings and of those with min-p, each in order of temperature."""
    plain: list[tuple[float, float, str]] = []
    with_min_p: list[tuple[float, float, str]] = []
    for name in decodings:
        if name == "greedy":
            plain.append((0.0, 0.0, name))
        elif match := DECODING.fullmatch(name):
            chain = with_min_p if match["p"] else plain
            chain.append((float(match["t"]), float(match["p"] or 0), name))
    return [n for *_, n in sorted(plain)], [n for *_, n in sorted(with_min_p)]


def draw_pass_at_k(lines: Sequence[PassLine], settings: BootstrapConfig) -> Figure:
    """Unbiased pass@k against k: mean over problems and runs, band of resampled problems."""
    figure, (axis,) = grid(1, 1, height=4.4, width=6.6)
    entries: list[tuple[Any, str]] = []
    for line in lines:
        k = np.arange(1, line.n + 1)
        curves = [pass_at_k(c, line.n) for c in line.counts]
        marked = line.style.drawn(marker=line.style.marker, markersize=5)
        powers = [2**i - 1 for i in range(line.n.bit_length())]
        axis.plot(k, np.mean([c.mean(0) for c in curves], axis=0), markevery=powers, **marked)
        if len({len(c) for c in curves}) == 1:
            interval = bootstrap(
                np.mean(curves, axis=0), draws=settings.draws, level=settings.level,
                seed=settings.seed,
            )  # fmt: skip
            axis.fill_between(k, interval[:, 0], interval[:, 1], color=line.style.colour,
                              alpha=0.15, linewidth=0)  # fmt: skip
        more = f", {len(curves)} seeds" if len(curves) > 1 else ""
        entries.append((Line2D([], [], **marked), line.label + more))
    axis.set_xscale("log", base=2)
    top = max(line.n for line in lines)
    ticks = [2**i for i in range(top.bit_length()) if 2**i <= top]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_xlabel("k samples")
    axis.set_title("pass@k: at least one of k samples correct")
    legend(figure, entries)
    return figure
