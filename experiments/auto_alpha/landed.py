"""Where the runs of this study landed: a row for each target, over its seeds.

python experiments/auto_alpha/landed.py multirun/auto_alpha > experiments/auto_alpha/landed.md
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

LAST = 10  # refills over which reached value and alpha are averaged


def landing(run: Path) -> tuple[str, dict[str, float]]:
    """What a run aimed at, in words, and what came of it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    summary = json.loads((run / "summary.json").read_text())
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/alpha_reached"]]
    reached = [float(row["train/alpha_reached"]) for row in rows]
    target: dict[str, Any] = config["alpha_schedule"]["target"]
    if "ratio" in target:
        aim, level = f"H / H_base = {target['ratio']:g}", target["ratio"] * reached[0]
    else:
        aim, level = f"KL = {target['budget']:g} nats a {target['per']}", target["budget"]
    alphas = [float(row["train/alpha"]) for row in rows]
    within = [abs(value / level - 1) <= 0.05 for value in smoothed(reached)]
    final = summary["final"]
    return f"{config['task']['name']}, {aim}", {
        "level": level,
        "reached": statistics.mean(reached[-LAST:]),
        "off": 100 * (statistics.mean(reached[-LAST:]) / level - 1),
        "alpha": statistics.mean(alphas[-LAST:]),
        "settled": math.nan if not within[-1] else last_outside(within) + 1,
        "headline": final.get("val/pass@1", final.get("val/quality", math.nan)),
    }


def smoothed(values: list[float]) -> list[float]:
    """Means over up to `LAST` refills, the newest of which is a value's own."""
    return [statistics.mean(values[max(0, i + 1 - LAST) : i + 1]) for i in range(len(values))]


def last_outside(within: list[bool]) -> int:
    """The last refill, from 1, at which it was not; 0 for none."""
    return max((i + 1 for i, inside in enumerate(within) if not inside), default=0)


def main() -> None:
    found = defaultdict(list)
    for path in sorted(Path(sys.argv[1]).glob("*/summary.json")):
        if json.loads(path.read_text())["status"] == "finished":
            aim, numbers = landing(path.parent)
            found[aim].append(numbers)
    print("| target | nats | reached | off by | α | within 5% from refill | pass@1 or validity |")
    print("|---|---|---|---|---|---|---|")
    for aim, runs in sorted(found.items()):
        columns = {name: [run[name] for run in runs] for name in runs[0]}
        shown = [
            " / ".join(f"{value:{form}}" for value in columns[name])
            for name, form in (
                ("level", ".3f"), ("reached", ".3f"), ("off", "+.1f"), ("alpha", ".2f"),
                ("settled", ".0f"), ("headline", ".3f"),
            )
        ]  # fmt: skip
        shown[4] = shown[4].replace("nan", "not yet")
        shown[2] = shown[2].replace(" /", "% /") + "%"
        print(f"| {aim} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
