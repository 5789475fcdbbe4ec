"""Made-up run folders for the tests of the report, written with the standard library only."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SETTINGS: dict[str, Any] = {
    "task": {"name": "arithmetic"},
    "model": {"name": "tiny"},
    "strategy": {"name": "powerflow", "format_penalty": -0.5},
    "buffer": {"max_staleness": 0},
    "alpha": 4.0,
    "epsilon": 0.2,
    "seed": 0,
    "refills": 4,
}


def settings(**changed: Any) -> dict[str, Any]:
    """A config.yaml; `strategy="la_tb"` changes its name, other keys are set as given."""
    config = json.loads(json.dumps(SETTINGS))
    if isinstance(changed.get("strategy"), str):
        config["strategy"]["name"] = changed.pop("strategy")
    for key, value in changed.items():
        node = config
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def make_run(
    folder: Path,
    curves: Mapping[str, Sequence[float]] | None = None,
    *,
    status: str | None = "finished",
    problems: Mapping[str, Mapping[str, float]] | None = None,
    **changed: Any,
) -> Path:
    """A run folder.

    Args:
        curves: metrics by refill from 0 on; `val/` ones make base and final of the summary.
        status: None writes no summary.json.
        problems: avg@4 by prompt, by decoding; `final` is the policy's at the last refill.
    """
    curves = {"val/pass@1": [0.2, 0.3, 0.4, 0.5, 0.6]} if curves is None else curves
    folder.mkdir(parents=True, exist_ok=True)
    config = settings(**changed)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(["alpha=4", f"run_dir={folder}"]))
    length = max((len(c) for c in curves.values()), default=0)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "refill", *curves])
        for refill in range(length):
            writer.writerow([2 * refill, refill, *(c[refill] for c in curves.values())])
    if status is not None:
        val = {m: c for m, c in curves.items() if m.startswith("val/")}
        summary = {
            "status": status, "task": config["task"]["name"], "model": config["model"]["name"],
            "strategy": config["strategy"]["name"], "alpha": config["alpha"],
            "epsilon": config["epsilon"], "seed": config["seed"], "refills": length - 1,
            "base": {m: c[0] for m, c in val.items()}, "base_decodings": {},
            "final": {m: c[-1] for m, c in val.items()}, "wall_s": 12.5, "tokens": 1000,
            "versions": {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.19.0"},
            "git_commit": "0123456789abcdef-dirty",
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    if problems is not None:
        write_problems(folder, problems, length - 1)
    return folder


def write_problems(folder: Path, problems: Mapping[str, Mapping[str, float]], refill: int) -> None:
    """problems.csv with one metric, avg@4."""
    with (folder / "problems.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["refill", "decoding", "prompt_id", "avg@4"])
        for decoding, scores in problems.items():
            at, name = (refill, "T=1") if decoding == "final" else (0, decoding)
            writer.writerows([at, name, prompt, score] for prompt, score in scores.items())
