"""A job of a sweep that submitit is asked to stop saves, is requeued and ends as one never was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import assert_same_run, end_of, finish, start, summary_of

pytestmark = pytest.mark.faults
SETTINGS = ("rollout=hf", "refills=12", "rollout.prompts_per_refill=4", "logger=none",
            "rollout.samples_per_prompt=4", "callbacks.evaluation.samples_per_prompt=2",
            "callbacks.evaluation.max_prompts=4")  # fmt: skip


def tasks_of(process: int) -> list[int]:
    """Processes that run submitit's jobs, started by this one or by those that it has started."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(")")[2].split()[1]
            )
            commands[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:  # it has just ended
            continue

    def descends(pid: int) -> bool:
        return pid == process or (pid in parents and descends(parents[pid]))

    return [p for p, said in commands.items() if "submitit.core._submit" in said and descends(p)]


def until_checkpoint(folder: Path, *, updates: int, within: float = 120) -> Path:
    """The run folder of the sweep's one job, as soon as its metrics have so many rows."""
    ends = time.monotonic() + within
    while time.monotonic() < ends:
        for found in folder.glob("multirun/*/*/checkpoints/last.ckpt"):
            run = found.parents[1]
            rows = (run / "metrics.csv").read_text().splitlines()
            if len(rows) > updates:
                return run
        time.sleep(0.05)
    raise AssertionError("no checkpoint")


@pytest.mark.parametrize("name", ["SIGUSR2"])
def test_a_job_that_submitit_preempts_is_requeued_and_ends_as_one_never_touched(
    tmp_path: Path, name: str
) -> None:
    finish(tmp_path, *SETTINGS, "run_dir=whole")
    process = start(tmp_path, "-m", "hydra/launcher=submitit_local", *SETTINGS)
    run = until_checkpoint(tmp_path, updates=6)
    (task,) = tasks_of(process.pid)
    os.kill(task, signal.Signals[name])
    code, output = end_of(process, within=300)
    assert code == 0, output[-3000:]
    logs = "".join(p.read_text() for p in tmp_path.glob("multirun/*/.submitit/*/*_log.*"))
    assert f"stopping: {name}" in logs
    assert "Requeued job" in logs
    assert "1 finished" in output
    assert summary_of(run)["status"] == "finished"
    assert_same_run(tmp_path / "whole", run)
