"""Run folders in; a figure of their curves and a table of their final figures out.

python -m powerflow_lit.report 'runs=[outputs/arithmetic/tiny]' output=report
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema import ReportConfig
from powerflow_lit.run_folder import read_summary

# Okabe-Ito colours, one for each strategy wherever it appears
COLOURS = {
    "powerflow": "#0072B2",
    "la_tb": "#56B4E9",
    "tb_traj": "#D55E00",
    "tb_token": "#E69F00",
    "tb_token_per_token": "#F0E442",
    "rl_traj": "#CC79A7",
    "rl_token": "#009E73",
}
TITLES = {
    "rollout/length_mean": "response length (tokens)",
    "val/pass@1": "pass@1",
    "rollout/repetition": "4-gram repetition",
    "val/quality": "validity",
    "val/modes@16": "modes among 16 samples",
    "val/length_mean": "response length (tokens)",
}
FIGURES = (
    "avg@16", "pass@16", "quality", "modes@16", "unique_valid@16", "length_mean", "format_rate",
    "repetition",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder as read."""

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, str]]

    @property
    def label(self) -> str:
        return f"{self.summary['strategy']} (alpha={self.summary['alpha']:g})"

    def curve(self, metric: str) -> dict[int, float]:
        """Last value of a metric by refill; refill 1's rollouts are the base's, drawn at 0."""
        shift = 1 if metric.startswith("rollout/") else 0
        return {
            int(row["refill"]) - shift: float(row[metric])
            for row in self.rows
            if row.get(metric) and row.get("refill")
        }


def read_runs(paths: Sequence[str]) -> tuple[list[Run], list[str]]:
    """All runs at or below the paths, and a line for each that cannot be used as finished."""
    runs, remarks = [], []
    for path in paths:
        folders = sorted(p.parent for p in Path(path).glob("**/metrics.csv"))
        if not folders:
            remarks.append(f"{path}: no run folder there")
        for folder in folders:
            summary = read_summary(folder)
            if summary is None:
                remarks.append(f"{folder}: no summary.json (still running, or killed); left out")
                continue
            if summary["status"] != "finished":
                remarks.append(f"{folder}: {summary['status']} after {summary['refills']} refills")
            with (folder / "metrics.csv").open(newline="") as file:
                runs.append(Run(folder, summary, list(csv.DictReader(file))))
    return runs, remarks


def plot_curves(runs: Sequence[Run], metrics: Sequence[str], path: Path) -> None:
    """One panel a metric: the mean over the runs of a label, a band from least to greatest."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.8), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for label, group in _by_label(runs).items():
            curves = [run.curve(metric) for run in group]
            refills = sorted(set.intersection(*(set(c) for c in curves)))
            values = [[c[r] for c in curves] for r in refills]
            colour = COLOURS.get(group[0].summary["strategy"])
            means = [sum(v) / len(v) for v in values]
            axis.plot(refills, means, color=colour, label=f"{label}, {len(group)} seed(s)")
            axis.fill_between(refills, *zip(*((min(v), max(v)) for v in values), strict=True),
                              color=colour, alpha=0.2, linewidth=0)  # fmt: skip
        axis.set_xlabel("refill")
        axis.set_title(TITLES.get(metric, metric))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(runs: Sequence[Run]) -> str:
    """Final figures as markdown: the base first, then mean and standard deviation over seeds."""
    names = [n for n in FIGURES if any(f"val/{n}" in r.summary["final"] for r in runs)]
    lines = ["| | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    groups = {"base, T=1": [r.summary["base"] for r in runs]}
    groups |= {label: [r.summary["final"] for r in g] for label, g in _by_label(runs).items()}
    for label, metrics in groups.items():
        cells = [
            _mean_and_spread([m[f"val/{n}"] for m in metrics if f"val/{n}" in m]) for n in names
        ]
        lines.append(f"| {label} | {len(metrics)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    digits = 1 if mean > 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="report")
def _main(cfg: DictConfig) -> None:
    try:
        config = typed(cfg, ReportConfig)
        runs, remarks = read_runs(config.runs)
        if not runs:
            raise ConfigError("; ".join(remarks) or "runs=[]: name a run folder or a multirun")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, config.metrics, output / "curves.png")
    (output / "table.md").write_text(table(runs))
    print(table(runs), *remarks, f"written to {output}", sep="\n")


def main() -> None:
    """Console script `powerflow-report`."""
    _main()


if __name__ == "__main__":
    main()
