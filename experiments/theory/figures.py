"""Figures and tables of the theory study, from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from powerflow_lit.reporting.figures import STYLE, save

Row = Mapping[str, Any]
KINDS = ("plain", "rare end")
BLOCKS = (1, 2, 4, 8)  # tokens; the last is LA-TB itself
BLUE, RED, ORANGE, GREEN, BLACK = (
    "#0072B2", "#D55E00", "#E69F00", "#009E73", "#000000",
)  # fmt: skip


def pick(rows: Sequence[Row], **wanted: object) -> list[Row]:
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def band(
    axis: Axes, rows: Sequence[Row], column: str, colour: str, label: str, **style: Any
) -> None:
    """Median over bases against alpha, and a band of the middle half."""
    alphas = sorted({r["alpha"] for r in rows})
    values = [[r[column] for r in rows if r["alpha"] == a] for a in alphas]
    axis.plot(
        alphas, [median(v) for v in values], color=colour, label=label, linewidth=1.8, **style
    )
    if len(values[0]) > 3:
        cut = [quantiles(v, n=4) for v in values]
        axis.fill_between(alphas, [c[0] for c in cut], [c[2] for c in cut], color=colour,
                          alpha=0.15, linewidth=0)  # fmt: skip


# --- figures -------------------------------------------------------------------------------------


def draw(targets: Sequence[Row], blocks: Sequence[Row], folder: Path) -> None:
    with plt.rc_context(STYLE):
        save(targets_figure(targets), folder / "targets.png", dpi=110)
        save(blocks_figure(blocks), folder / "blocks.png", dpi=110)


def targets_figure(rows: Sequence[Row]) -> plt.Figure:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6))
    plain = pick(rows, kind="plain")
    distortion, price, length, inversion, mode, tempered = axes.flat

    sharpened = [r for r in plain if r["alpha"] != 1]
    for side, colour, label in ((1, RED, "α > 1"), (-1, BLUE, "α < 1")):
        of = [r for r in sharpened if side * (r["alpha"] - 1) > 0]
        distortion.scatter([abs(r["log_z"]) for r in of],
                           [r["distortion_formula"] / r["distortion"] for r in of],
                           s=4, color=colour, alpha=0.25, linewidth=0, label=label)  # fmt: skip
    distortion.set(xscale="log", ylim=(0, 2.2), xlabel="|log Z′|",
                   title="½ λ² Var|y| over the true KL")  # fmt: skip
    distortion.axhline(1, color="black", linewidth=1)
    legend = distortion.legend(frameon=False, markerscale=3)
    for handle in legend.legend_handles:
        handle.set_alpha(1)

    for kind, colour in zip(KINDS, (BLUE, ORANGE), strict=True):
        of = pick(rows, kind=kind)
        band(price, of, "log_z", colour, kind)
        alphas = sorted({r["alpha"] for r in of} - {1.0})
        longer = [mean(r["length_la_tb"] > r["length_base"] for r in pick(of, alpha=a))
                  for a in alphas]  # fmt: skip
        length.plot(alphas, longer, color=colour, label=kind, linewidth=1.8)
    price.set(title="log Z′ (nats per token)", ylim=(-8, 2))
    length.set(title="share of bases that LA-TB lengthens", ylim=(0, 1))

    band(inversion, plain, "inversion_la_tb", BLUE, "LA-TB")
    band(inversion, plain, "inversion_tempered", ORANGE, "temperature 1/α")
    inversion.axhline(0, color=GREEN, linewidth=1.8, label="p^α")
    inversion.set(title="pairwise inversion rate")

    band(mode, plain, "mode_power", GREEN, "mode, under p^α")
    elsewhere = pick(plain, mode_is_best=0)
    band(mode, elsewhere, "mode_la_tb", RED, "mode, under LA-TB*")
    band(mode, elsewhere, "best_la_tb", BLUE, "best B/|y|, under LA-TB*")
    mode.set(title=f"mass (*: {len(elsewhere) / len(plain):.0%} of bases, where they differ)",
             ylim=(0, 1.02))  # fmt: skip

    for kind, colour in zip(KINDS, (BLUE, ORANGE), strict=True):
        band(tempered, pick(rows, kind=kind), "tv_tempered_la_tb", colour, kind)
    tempered.set(title="total variation, temperature 1/α to LA-TB", ylim=(0, 1))

    for axis in (price, length, inversion, mode, tempered):
        axis.set(xscale="log", xlabel="α")
        axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def blocks_figure(rows: Sequence[Row]) -> plt.Figure:
    """Total variation to the target against steps, own samples: mean and range over seeds."""
    bases, alphas = (sorted({r[key] for r in rows}) for key in ("base", "alpha"))
    figure, axes = plt.subplots(len(bases), len(alphas), figsize=(12, 3.4 * len(bases)),
                                squeeze=False, sharex=True)  # fmt: skip
    colours = dict(zip(BLOCKS, (RED, ORANGE, GREEN, BLACK), strict=True))
    for line, base in zip(axes, bases, strict=True):
        for axis, alpha in zip(line, alphas, strict=True):
            for size in BLOCKS:
                of = pick(rows, base=base, alpha=alpha, block_size=size)
                steps = sorted({r["step"] for r in of})
                values = [[r["total_variation"] for r in of if r["step"] == s] for s in steps]
                label = "la_tb" if size == BLOCKS[-1] else f"blocks of {size}"
                axis.plot(steps, [mean(v) for v in values], color=colours[size], label=label)
                axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values],
                                  color=colours[size], alpha=0.15, linewidth=0)  # fmt: skip
            axis.set(yscale="log", title=f"base {base}, α = {alpha:g}")
        line[0].set_ylabel("total variation to the target")
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return figure


# --- tables --------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every) + "\n"


def targets_table(rows: Sequence[Row]) -> str:
    """Markdown: medians over the bases."""
    columns = {
        "log Z′": ("log_z", 2), "E|y|": ("length_base", 1), "p^α": ("length_power", 1),
        "LA-TB": ("length_la_tb", 1), "½λ²Var": ("distortion_formula", 3),
        "KL": ("distortion", 3), "inversions": ("inversion_la_tb", 3),
        "at T = 1/α": ("inversion_tempered", 3), "mode, p^α": ("mode_power", 2),
        "mode, LA-TB": ("mode_la_tb", 2), "best B/\\|y\\|": ("best_la_tb", 2),
        "TV": ("tv_tempered_la_tb", 2),
    }  # fmt: skip
    lines = []
    for kind in KINDS:
        for alpha in (0.5, 0.97, 1.03, 2.0, 4.0, 8.0, 32.0):
            of = pick(rows, kind=kind, alpha=alpha)
            longer = mean(r["length_la_tb"] > r["length_base"] for r in of)
            medians = [f"{median(r[name] for r in of):.{d}f}" for name, d in columns.values()]
            lines.append([kind, f"{alpha:g}", f"{longer:.0%}", *medians])
    return table(["base", "α", "lengthened", *columns], lines)


def spread(values: Sequence[float], digits: int) -> str:
    tail = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{tail}"


def blocks_table(rows: Sequence[Row]) -> str:
    """Markdown: total variation on the way and at the end, mean ± deviation over seeds."""
    steps = sorted({r["step"] for r in rows})
    looks = [steps[len(steps) // 4], steps[len(steps) // 2], steps[-1]]
    lines = []
    for base in sorted({r["base"] for r in rows}):
        for alpha in sorted({r["alpha"] for r in rows}):
            for size in BLOCKS:
                of = pick(rows, base=base, alpha=alpha, block_size=size)
                found = [spread([r["total_variation"] for r in pick(of, step=s)], 4) for s in looks]
                name = "la_tb" if size == BLOCKS[-1] else str(size)
                z = spread([r["log_z_error"] for r in pick(of, step=steps[-1])], 3)
                lines.append([str(base), f"{alpha:g}", name, *found, z])
    return table(["base", "α", "block", *(f"step {s}" for s in looks), "error of log Z′"], lines)


def noise_table(rows: Sequence[Row]) -> str:
    """Markdown: noise of one response's gradient over the squared mean gradient."""
    lines = []
    for at in ("start", "half-way"):
        for base in sorted({r["base"] for r in rows}):
            for alpha in sorted({r["alpha"] for r in rows}):
                of = pick(rows, at=at, base=base, alpha=alpha)
                whole = pick(of, block_size=BLOCKS[-1])[0]["noise"]
                cells = [f"{whole:.1f}"]
                for size in reversed(BLOCKS[:-1]):
                    pair = [
                        pick(of, block_size=size, flow=f)[0]["noise"] for f in ("zero", "exact")
                    ]
                    cells.append(f"{pair[0]:.1f} / {pair[1]:.1f}")
                lines.append([at, str(base), f"{alpha:g}", *cells])
    sizes = [f"blocks of {s}: V = 1 / exact" for s in reversed(BLOCKS[:-1])]
    return table(["policy", "base", "α", "la_tb", *sizes], lines)
