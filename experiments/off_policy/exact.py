"""Does a share of base samples mend the collapse of a policy that only sees its own?

python experiments/off_policy/exact.py [--output DIR] [--steps N] [--seeds N]

On the enumerable language of `experiments/exactness`, whose target is known exactly. Writes
exact.csv, exact.json and exact.png. See README.md beside this file for what was found.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import LearnedScalar, Recipe, own_samples, training
from powerflow_lit.objectives import BalanceObjective, ImportanceWeight, la_tb_mismatch
from powerflow_lit.reporting.grouping import COLOURS
from powerflow_lit.run_folder import git_commit, versions

ALPHA, EPSILON, GROUP = 4.0, 0.2, 8
COLLAPSING = (1, 3, 4)  # of the eight bases of experiments/exactness
HARMLESS = (0, 2, 5, 6, 7)
RATES = {"fast": (0.5, 0.01), "fitting": (0.02, 0.1)}  # (policy, log Z'), as there
WEIGHTS = {
    "none": ImportanceWeight("none", None, None),
    "eq. 10": ImportanceWeight("seq_sum", EPSILON, EPSILON),
    "truncated": ImportanceWeight("seq_sum", None, EPSILON),
    # pi over the mixture's chance of a string: the balance heuristic
    "mixture": ImportanceWeight("seq_sum", None, None),
}
LOOKS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COLUMNS = ("base", "rates", "base_share", "weight", "seed", "step", "total_variation", "log_z",
           "log_z_exact", "loss")  # fmt: skip
CURVES = {  # (share, weight) -> colour
    (0.0, "none"): COLOURS["tb_traj"],
    (0.25, "none"): COLOURS["powerflow"],
    (0.5, "none"): COLOURS["la_tb"],
    (0.25, "truncated"): COLOURS["tb_token"],
    (0.25, "mixture"): "#000000",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One training, 256 strings a refill and two updates."""

    base: int
    rates: str
    base_share: float
    weight: str
    seed: int


def cases(seeds: int) -> list[Case]:
    """Collapsing bases with every share and weight; the others, and fitting rates, with few."""
    shares = [(share, "none") for share in (0.0, 0.25, 0.5)]
    weighted = [(0.25, weight) for weight in ("eq. 10", "truncated", "mixture")]
    few = [(0.0, "none"), (0.25, "none")]
    chosen = [(b, "fast", *one) for b in COLLAPSING for one in (*shares, *weighted)]
    chosen += [(b, "fast", *one) for b in HARMLESS for one in few]
    chosen += [(COLLAPSING[0], "fitting", *one) for one in few]
    return [Case(*one, seed) for one in chosen for seed in range(seeds)]


def looked_at(case: Case, language: Language, steps: int) -> Iterator[Row]:
    """Trains one case; rows at the looks."""
    base = language.bigram_base(case.base)
    target, exact_z = language.length_averaged_target(base, ALPHA)
    recipe = Recipe(steps, *RATES[case.rates], samples=256, updates_per_refill=2)
    objective = partial(BalanceObjective(la_tb_mismatch, WEIGHTS[case.weight]), alpha=ALPHA)
    batch = own_samples(
        language, base, recipe, seed=case.seed, group=GROUP, base_share=case.base_share,
        as_mixture=case.weight == "mixture",
    )  # fmt: skip
    looks = {round(share * steps) for share in LOOKS}
    for step in training(base, objective, LearnedScalar(), recipe, batch):
        if step.number in looks:
            yield {
                **asdict(case),
                "step": step.number,
                "total_variation": total_variation(language.log_probs(step.logits), target),
                "log_z": step.log_z,
                "log_z_exact": exact_z,
                "loss": step.loss,
            }


def table(rows: Iterable[Row], steps: int) -> str:
    """TV at the end by base, as Markdown."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["step"] == steps:
            key = (row["base"], row["rates"], row["base_share"], row["weight"])
            found.setdefault(key, []).append(row["total_variation"])
    lines = ["| base | rates | base share | weight | TV at end |", "|---|---|---|---|---|"]
    for (base, rates, share, weight), values in found.items():
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        lines.append(f"| {base} | {rates} | {share:g} | {weight} | {mean(values):.3f}{spread} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, len(COLLAPSING), figsize=(12, 3.6), sharey=True)
    for axis, base in zip(axes, COLLAPSING, strict=True):
        for (share, weight), colour in CURVES.items():
            by_step: dict[int, list[float]] = {}
            for row in rows:
                if (row["base"], row["rates"]) != (base, "fast"):
                    continue
                if (row["base_share"], row["weight"]) == (share, weight):
                    by_step.setdefault(row["step"], []).append(row["total_variation"])
            steps = sorted(by_step)
            name = "own samples only" if share == 0 else f"{share:.0%} of the base"
            name += "" if weight == "none" else f", {weight} weight"
            axis.plot(steps, [mean(by_step[s]) for s in steps], color=colour, label=name)
            low, high = ([f(by_step[s]) for s in steps] for f in (min, max))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=f"base {base}", xlabel="update", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("total variation to the target")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of a training")
    parser.add_argument("--seeds", type=int, default=3, help="of each case")
    options = parser.parse_args()
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    torch.set_num_threads(1)  # tensors are tiny, and sums keep their order
    options.output.mkdir(parents=True, exist_ok=True)
    language, todo, rows = Language.build(), cases(options.seeds), list[Row]()
    start = time.perf_counter()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    with bar:
        for case in bar.track(todo, description="trainings"):
            rows += looked_at(case, language, options.steps)
    wall = time.perf_counter() - start
    with (options.output / "exact.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    about = {
        "command": "python experiments/off_policy/exact.py"
        f" --steps {options.steps} --seeds {options.seeds}",
        "git_commit": git_commit(),
        "versions": versions(),
        "rates": RATES,
        "wall_s": round(wall, 1),
    }
    (options.output / "exact.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(rows, options.output / "exact.png")
    print(table(rows, options.steps))
    print(f"{len(todo)} trainings in {wall:.0f} s; written to {options.output}")


if __name__ == "__main__":
    main()
