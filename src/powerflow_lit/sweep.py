"""Sweeps that survive: a job's folder is keyed by its configuration, and what has ended is skipped.

Hydra calls `SweepCallback` in the process that launches the jobs, whichever launcher runs them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from powerflow_lit.config.launching import COMPOSITION, explained, refuse
from powerflow_lit.run_folder import write_whole

State = Literal["new", "unfinished", "failed", "finished", "diverged"]
ENDED: tuple[State, ...] = ("finished", "diverged")  # the same configuration would end so again


@dataclass(frozen=True)
class Job:
    """A run of a sweep: where it goes and what was chosen for it."""

    folder: Path
    overrides: tuple[str, ...]


def job_state(folder: Path) -> State:
    """How far the run in a folder has come; `finished` is what its summary says."""
    status = (_read_json(folder / "summary.json") or {}).get("status")
    if status in ("finished", "diverged", "failed"):
        return status  # type: ignore[no-any-return]
    return "unfinished" if (folder / "config.yaml").exists() else "new"


class SweepCallback(Callback):
    """Says before a sweep what there is to do, and after it what became of every job."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not all_jobs_known(config.hydra):
            return
        try:
            self.jobs = jobs = planned_jobs(config)
        except COMPOSITION as error:
            # Hydra would warn of it, make the sweep's folder and then come upon it again
            refuse(explained(error, "train", sys.argv[1:]))
        _write_manifest(Path(config.hydra.sweep.dir), str(config.study), jobs)
        states = [job_state(job.folder) for job in jobs]
        todo = {state: states.count(state) for state in ("new", "unfinished", "failed")}
        parts = [
            f"{todo['new']} to run",
            f"{todo['unfinished'] + todo['failed']} to take up again",
            f"{sum(s in ENDED for s in states)} ended before and skipped",
        ]
        print(f"sweep {config.study}: {len(jobs)} jobs in {config.hydra.sweep.dir}")
        print("  " + ", ".join(parts), flush=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not self.jobs:
            return
        states = {job: job_state(job.folder) for job in self.jobs}
        counts = Counter(states.values())
        print(f"sweep {config.study}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
        bad = [job for job, state in states.items() if state not in ENDED]
        for job in bad:
            summary = _read_json(job.folder / "summary.json") or {}
            why = summary.get("error", "no summary: killed, or still running elsewhere")
            print(f"  {states[job]}: {job.folder.name} ({' '.join(job.overrides)}): {why}")
        if bad:
            print("  the same command takes them up again and skips the rest")
            sys.exit(1)
        print(f"  compare: python -m powerflow_lit.report 'runs=[{config.hydra.sweep.dir}]'")


def all_jobs_known(hydra: Any) -> bool:
    """Whether Hydra's own sweeper runs the multirun; others choose their jobs as they go.

    Args:
        hydra: the `hydra` node of the configuration.
    """
    return str(hydra.sweeper._target_).endswith("BasicSweeper")


def planned_jobs(config: DictConfig) -> list[Job]:
    """All jobs of a multirun of Hydra's own sweeper, each once.

    Args:
        config: the master configuration of the multirun, `hydra` node included.
    """
    fixed = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    typed = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = hydra.config_loader
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(
        [*fixed, *map(str, typed)]
    )
    jobs: dict[Path, Job] = {}
    for overrides in BasicSweeper.split_arguments(parsed, None)[0]:
        job = loader.load_sweep_config(config, list(overrides))
        # a run_dir that was typed takes the place of the sweep's folder
        named = any(override.startswith("run_dir=") for override in overrides)
        parent = Path(job.run_dir if named else job.hydra.sweep.dir)
        folder = parent / str(job.hydra.sweep.subdir)
        jobs.setdefault(folder, Job(folder, tuple(overrides)))
    return list(jobs.values())


def _write_manifest(folder: Path, study: str, jobs: Sequence[Job]) -> None:
    """sweep.json: what belongs to the study, so that `report` can say what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.json"
    before = _read_json(path) or {}
    listed: dict[str, Mapping[str, Any]] = {
        # a planned job that never started may have been a typing error
        job["folder"]: job
        for job in before.get("jobs", [])
        if (folder / job["folder"]).exists()
    }
    for job in jobs:
        name = os.path.relpath(job.folder, folder)
        listed[name] = {"folder": name, "overrides": list(job.overrides)}
    command = ["python -m powerflow_lit.train", *sys.argv[1:]]
    commands = [c for c in before.get("commands", []) if c != command] + [command]
    record = {"study": study, "commands": commands, "jobs": list(listed.values())}
    write_whole(path, json.dumps(record, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where the file is absent or was cut short."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
