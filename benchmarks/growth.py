"""How ours grows: tokens/s and peak memory with prompts, group size, length and vocabulary."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import track

from benchmarks.comparing import new_record, settings_of, take_turns, write
from benchmarks.models import shape_of, write_model
from benchmarks.workloads import Workload

START = Workload("growth", "0.8M", "ragged")
VALUES: dict[str, Sequence[int]] = {
    "prompts": (4, 8, 16, 32),
    "rollouts": (4, 8, 16, 32),
    "response_mean": (32, 64, 128, 256),
    "vocabulary": (512, 8192, 32_768, 151_936),
}
LABELS = {
    "prompts": "prompts a refill",
    "rollouts": "rollouts a prompt",
    "response_mean": "mean tokens of a response",
    "vocabulary": "vocabulary",
}
REFILLS = 2


def workloads(start: Workload, *, quick: bool) -> Iterator[tuple[str, int, Workload]]:
    """(what grows, its value, workload): one thing at a time, all else as in `start`."""
    for factor, values in VALUES.items():
        for value in values[:2] if quick else values:
            name = f"{factor} {value}"
            if factor == "vocabulary":
                yield factor, value, replace(start, name=name, shape=f"{start.shape}@{value}")
            elif factor == "response_mean":
                low, _ = start.response_range
                changed = replace(start, name=name, response_mean=value)
                yield factor, value, replace(changed, response_range=(low, 4 * value))
            else:
                yield factor, value, replace(start, name=name, **{factor: value})


def grow(
    out: Path, *, threads: int, overrides: Sequence[str], quick: bool, start: Workload = START
) -> dict[str, Any]:
    """Measures every point and writes the record, and a plot of each thing that grows."""
    engine = "vllm" if find_spec("vllm") else "hf"
    record = new_record(threads, overrides) | {"kind": "growth", "engine": engine, "points": []}
    with tempfile.TemporaryDirectory() as folder:
        points = list(workloads(start, quick=quick))
        for factor, value, workload in track(points, description=f"growth, {engine}"):
            model = write_model(shape_of(workload.shape), Path(folder) / workload.shape)
            settings = settings_of(workload, model, threads, overrides)
            found = take_turns(
                {"ours": ("benchmarks.ours", engine)}, settings, Path(folder),
                refills=REFILLS, step=lambda _: None,
            )["ours"]  # fmt: skip
            if "refills" not in found:
                continue
            wall = median(r["wall_s"] for r in found["refills"])
            record["points"].append(
                {
                    "factor": factor,
                    "value": value,
                    "wall_s": wall,
                    "tokens_per_s": workload.response_tokens / wall,
                    "peak_mb": found["peak_mb"],
                    "workload": asdict(workload),
                    "refills": found["refills"],
                }
            )
            write(record, out)
    for factor in VALUES:
        plot(record, factor, out.with_name(f"growth_{factor}.png"))
    print(f"written to {out}, plots beside it")
    return record


def plot(record: Mapping[str, Any], factor: str, path: Path) -> None:
    """Tokens/s and peak memory against one thing that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [p for p in record["points"] if p["factor"] == factor]
    values = [p["value"] for p in points]
    figure, left = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    right = left.twinx()
    left.plot(values, [p["tokens_per_s"] for p in points], "o-", color="C0")
    right.plot(values, [p["peak_mb"] for p in points], "s--", color="C1")
    left.set(xscale="log", xlabel=LABELS[factor], xticks=values, ylim=(0, None))
    left.set_xticks([], minor=True)
    left.set_xticklabels([f"{v:,}" for v in values])
    left.set_ylabel("response tokens/s", color="C0")
    right.set_ylabel("peak memory of the process, MB", color="C1")
    right.set_ylim(0, None)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
