"""Interrupted runs go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.integration.test_commands import rows_of, summary_of, train

QUICK = ("debug=fast", "logger=none", "refills=4", "callbacks.evaluation.every_n_refills=2")
UNTIMED = ("perf/",)


def final_state(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return state["state_dict"]


def killed_at(folder: Path, line_start: str, *overrides: str) -> None:
    """A training run, killed without warning when it prints such a line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "powerflow_lit.train", *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(line_start):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_two_and_two_refills_equal_four_bit_by_bit(tmp_path: Path, engine: str) -> None:
    settings = (*QUICK, f"rollout={engine}")
    train(tmp_path, *settings, "run_dir=whole")
    killed_at(tmp_path, "refill   2/4", *settings, "run_dir=halves")
    train(tmp_path, "resume=halves")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    expected, found = final_state(whole), final_state(halves)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert summary_of(whole)["final"] == summary_of(halves)["final"]
    assert summary_of(whole)["base"] == summary_of(halves)["base"]
    for one, other in zip(rows_of(whole), rows_of(halves), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if not name.startswith(UNTIMED):
                assert one[name] == other[name], name


def processes_of(group: int) -> str:
    """Process ids of a process group, one a line."""
    return subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout


def test_ctrl_c_leaves_a_resumable_checkpoint_and_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "powerflow_lit.train",
            *QUICK,
            "refills=500",
            "run_dir=run",
            "logger=wandb",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("refill   3/500"):
            process.send_signal(signal.SIGINT)
            break
    started = time.monotonic()
    process.wait(timeout=120)  # a busy machine is given time, an unheeded signal is not
    assert time.monotonic() - started < 60
    assert process.returncode != 0
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    # W&B's service closes its files and follows
    deadline = time.monotonic() + 30
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == "", "no process of the run's group is left"
    # a run without an export yet is evaluated from its checkpoint
    command = [sys.executable, "-m", "powerflow_lit.evaluate", "run=run", "rollout=hf"]
    small = ["samples_per_prompt=1", "decodings=[{temperature: 0.0, min_p: 0.0}]", "output=scored"]
    subprocess.run([*command, *small], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "scored" / "eval.json").exists()


def test_resume_auto_finds_the_unfinished_twin(tmp_path: Path) -> None:
    settings = [*QUICK, "rollout=hf", "alpha=2"]
    killed_at(tmp_path, "refill   1/4", *settings)
    train(tmp_path, *settings, "resume=auto")
    (metrics,) = tmp_path.glob("outputs/**/metrics.csv")
    assert summary_of(metrics.parent)["status"] == "finished"
    assert [int(r["step"]) for r in rows_of(metrics.parent)] == list(range(9))
