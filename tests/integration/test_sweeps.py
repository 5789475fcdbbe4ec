"""Sweeps as typed: started again they repeat nothing, and one failing job stops no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import command

FAST = ("debug=fast", "rollout=hf", "logger=none", "callbacks.evaluation.max_prompts=16")
COMMAND = (sys.executable, "-m", "powerflow_lit.train", "-m")


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    chosen = ["-m", *overrides, *FAST]
    return command("powerflow_lit.train", chosen, folder=folder, env=dict(os.environ))


def summaries(folder: Path) -> dict[int, Path]:
    """summary.json by seed."""
    found = folder.glob("multirun/*/*/summary.json")
    return {json.loads(path.read_text())["seed"]: path for path in found}


@pytest.mark.faults
def test_a_killed_sweep_repeats_no_finished_job_and_resumes_the_interrupted_one(
    tmp_path: Path,
) -> None:
    choices = ("seed=0,1,2", "refills=6")
    process = subprocess.Popen(
        [*COMMAND, *choices, *FAST], cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not (len(summaries(tmp_path)) == 1 and len(checkpoints(tmp_path)) == 2):
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = summaries(tmp_path)[0]
    before = finished.stat().st_mtime_ns, finished.read_bytes()

    result = sweep(tmp_path, *choices)
    assert result.returncode == 0, result.stderr
    assert "1 to run, 1 to take up again, 1 ended before and skipped" in result.stdout
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == before
    assert sorted(summaries(tmp_path)) == [0, 1, 2]
    for path in summaries(tmp_path).values():
        assert json.loads(path.read_text())["status"] == "finished"
        rows = (path.parent / "metrics.csv").read_text().splitlines()
        steps = [row.split(",")[0] for row in rows[1:]]
        assert len(steps) == len(set(steps)), "a resumed job doubles no row"
        problems = (path.parent / "problems.csv").read_text().splitlines()
        assert len(problems) == len(set(problems))


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("multirun/*/*/checkpoints/last.ckpt"))


def test_a_failing_job_is_listed_at_the_end_and_stops_no_other(tmp_path: Path) -> None:
    # beta = 1/(alpha-1) refuses rl_traj here
    result = sweep(tmp_path, "strategy=rl_traj,powerflow", "alpha=0.5")
    assert result.returncode == 1
    assert "1 failed, 1 finished" in result.stdout
    assert "failed: arithmetic_rl_traj" in result.stdout
    assert "alpha > 1" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    again = sweep(tmp_path, "strategy=rl_traj,powerflow", "alpha=0.5")
    assert "0 to run, 1 to take up again, 1 ended before and skipped" in again.stdout


def test_a_mistyped_value_is_one_line_and_stops_no_other_job(tmp_path: Path) -> None:
    result = sweep(tmp_path, "alpha=abc,2", "refills=1")
    assert result.returncode == 1
    assert "1 failed, 1 finished" in result.stdout
    assert "alpha" in result.stdout
    assert "abc" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "launcher", ["processes", pytest.param("submitit_local", marks=pytest.mark.slow)]
)
def test_other_launchers_run_every_job(tmp_path: Path, launcher: str) -> None:
    chosen = (f"hydra/launcher={launcher}", "epsilon=0.1,0.3", *FAST)
    result = subprocess.run([*COMMAND, *chosen], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 finished" in result.stdout
    found = list(tmp_path.glob("multirun/*/*/summary.json"))
    assert {json.loads(p.read_text())["epsilon"] for p in found} == {0.1, 0.3}


def test_the_manifest_lists_every_job_of_the_study(tmp_path: Path) -> None:
    sweep(tmp_path, "study=mine", "refills=1", "seed=0")
    sweep(tmp_path, "study=mine", "refills=1", "seed=0,1")
    manifest = json.loads((tmp_path / "multirun" / "mine" / "sweep.json").read_text())
    assert len(manifest["commands"]) == 2
    folders = [job["folder"] for job in manifest["jobs"]]
    assert len(folders) == 2, "the same configuration is the same job"
    assert all((tmp_path / "multirun" / "mine" / f / "summary.json").exists() for f in folders)
