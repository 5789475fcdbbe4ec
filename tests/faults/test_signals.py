"""A run that is asked to stop saves at the next token or update, says so, and leaves no process."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import (
    EVALUATION,
    QUICK,
    REFILL,
    STEP,
    TICK,
    assert_same_run,
    end_of,
    finish,
    last_checkpoint,
    left_of,
    start,
    summary_of,
)

pytestmark = pytest.mark.faults

LOADING = "powerflow_lit.assembly:load_model#1"
# moment, signal, exit code, (refills, updates) that are saved
STOPS = {
    "while it generates": (f"{REFILL}#3>{TICK}#5", "SIGTERM", (2, 4)),
    "in the first refill": (f"{REFILL}#1>{TICK}#5", "SIGTERM", (0, 0)),
    "between two updates": (f"{STEP}#5", "SIGTERM", (2, 5)),
    "while it evaluates": (f"{EVALUATION}#2>{TICK}#5", "SIGTERM", (1, 4)),
    "while the base is evaluated": (f"{EVALUATION}#1>{TICK}#5", "SIGINT", (0, 0)),
    "as SLURM asks": (f"{REFILL}#3>{TICK}#5", "SIGUSR1", (2, 4)),
    "by Ctrl-C": (f"{REFILL}#3>{TICK}#5", "SIGINT", (2, 4)),
}
# by which Lightning knows that it is a job of SLURM's, and takes signals itself
SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    finish(folder, *QUICK, "rollout=vllm", "run_dir=whole")
    return folder / "whole"


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_is_saved_within_seconds_and_resumes_bit_by_bit(
    whole: Path, stop: str, tmp_path: Path
) -> None:
    moment, name, saved = STOPS[stop]
    settings = (*QUICK, "rollout=vllm", "run_dir=run", "logger=wandb")
    env = SLURM if stop == "as SLURM asks" else None
    process = start(tmp_path, *settings, env=env, fault=(moment, name))
    code, output = end_of(process, within=300)
    assert code == 128 + signal.Signals[name], output[-3000:]
    asked = re.search(r"FAULT \w+ ([\d.]+)", output)
    assert asked is not None
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert file.stat().st_mtime - float(asked[1]) < 10, "seconds from the signal to the checkpoint"
    assert "continue with: python -m powerflow_lit.train resume=run" in output
    assert "Traceback" not in output
    state = last_checkpoint(tmp_path / "run")["run"]
    assert (state["refills"], state["updates"]) == saved
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["stopped_by"]) == ("interrupted", name)
    assert left_of(process) == ""
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")
    assert len(list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))) == 2, "a second segment"


@pytest.mark.parametrize("moment", [f"{REFILL}#2>{TICK}#5", f"{EVALUATION}#1>{TICK}#5", LOADING])
def test_ctrl_c_twice_is_out_within_thirty_seconds(tmp_path: Path, moment: str) -> None:
    process = start(
        tmp_path, *QUICK, "rollout=vllm", "run_dir=run", "logger=wandb", fault=(moment, "SIGINT*2")
    )
    code, output = end_of(process, within=300)
    asked = re.search(r"FAULT \w+ ([\d.]+)", output)
    assert asked is not None
    assert time.time() - float(asked[1]) < 30
    assert code == 130
    assert left_of(process) == ""


def test_a_stop_while_the_model_loads_ends_the_run_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, *QUICK, "rollout=hf", "run_dir=run", fault=(LOADING, "SIGTERM"))
    code, output = end_of(process, within=300)
    assert code == 143
    assert "Traceback" not in output
    assert "stopping: SIGTERM" in output
    finish(tmp_path, "resume=run")


def test_a_stop_ends_a_whole_sweep(tmp_path: Path) -> None:
    moment = f"{REFILL}#2>{TICK}#5"
    process = start(tmp_path, "-m", *QUICK, "rollout=hf", "seed=0,1", fault=(moment, "SIGTERM"))
    code, output = end_of(process, within=300)
    assert code == 143
    assert len(list(tmp_path.glob("multirun/*/*/summary.json"))) == 1, output[-2000:]
    assert left_of(process) == ""
    finish(tmp_path, "-m", *QUICK, "rollout=hf", "seed=0,1")
