"""Runs on two ranks over gloo, started by Lightning, torchrun and as by SLURM; what ends them.

No rank is left waiting for another, whatever ends one of them and wherever; and a run that goes on
ends as if nothing had ended it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.runs import (
    EVALUATION,
    QUICK,
    REFILL,
    SAVE,
    STEP,
    assert_same_run,
    end_of,
    finish,
    kill,
    left_of,
    start,
    summary_of,
    until_line,
)

pytestmark = pytest.mark.faults

RANKS = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "rollout=hf")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DEADLINE = 60.0  # seconds
LONG = (*QUICK, *RANKS, "refills=50", "run_dir=run", "callbacks.evaluation.every_n_refills=50")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a run that Lightning has started, by rank."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [process.pid, *map(int, found.stdout.split())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing has ended."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, *QUICK, *RANKS, "run_dir=run")
    return folder / "run"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["training", "rollout"])
def test_a_rank_that_is_killed_takes_the_other_with_it(
    tmp_path: Path, rank: int, moment: str
) -> None:
    # rollouts of minutes: a rank amid one would not miss the other before its end
    slow = ("rollout.samples_per_prompt=4096", "rollout.engine.sequences_per_batch=64")
    process = start(tmp_path, *LONG, *(slow if moment == "rollout" else ()))
    if moment == "rollout":
        until_line(process, "prompts as plain text")
        pids = ranks_of(process)
        while len(pids) < 2 or _cpu_seconds(pids[1]) < 15:  # far into its first rollout
            assert process.poll() is None
            time.sleep(0.5)
            pids = ranks_of(process)
    else:
        until_line(process, "refill   1/50")
        pids = ranks_of(process)
    os.kill(pids[rank], signal.SIGKILL)
    code, output = end_of(process, within=DEADLINE)  # the pipe closes when both are gone
    assert code != 0
    said = (
        f"rank 1: rank 0 (process {pids[0]}) has ended" if rank == 0 else
        f"rank 1 (process {pids[1]}) has ended by SIGKILL"
    )  # fmt: skip
    assert said in output or "another rank has ended, or does not answer" in output, output[-3000:]
    assert "resume=run" in output
    assert left_of(process, after=5) == ""
    if rank == 1:
        assert summary_of(tmp_path / "run")["status"] == "failed"


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("moment", [f"{REFILL}#2", f"{STEP}#3", f"{SAVE}#2", f"{EVALUATION}#2"])
def test_a_run_whose_ranks_were_killed_goes_on_as_if_they_were_not(
    tmp_path: Path, whole: Path, moment: str
) -> None:
    # the fault is that of the first rank, whose environment the other has; both reach it
    process = start(tmp_path, *QUICK, *RANKS, "run_dir=run", fault=(moment, "SIGKILL"))
    code, _ = end_of(process, within=200)
    assert code == -signal.SIGKILL
    assert left_of(process, after=DEADLINE) == ""
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_and_saves_them_all(
    tmp_path: Path, whole: Path, rank: int
) -> None:
    process = start(tmp_path, *QUICK, *RANKS, "run_dir=run")
    until_line(process, "refill   1/4")
    os.kill(ranks_of(process)[rank], signal.SIGTERM)
    code, output = end_of(process, within=DEADLINE)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert "continue with" in output
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    assert left_of(process, after=5) == ""
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")


def test_ctrl_c_twice_ends_all_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, *LONG)
    until_line(process, "refill   1/50")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
    end_of(process, within=DEADLINE)
    assert left_of(process, after=5) == ""


def test_what_one_rank_refuses_ends_all_with_its_word(tmp_path: Path) -> None:
    process = start(
        tmp_path, *QUICK, *RANKS, "run_dir=run",
        "rollout.engine._target_=tests.faults.faulty.OtherEngineOnRankOne",
        env={"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    code, output = end_of(process, within=200)
    assert code == 2
    assert "error: rank 1: refill 1: engine and trainer disagree by" in output
    assert "Traceback" not in output
    assert summary_of(tmp_path / "run")["status"] == "failed"
    assert left_of(process, after=5) == ""


def test_all_ranks_stop_where_updates_diverge(tmp_path: Path) -> None:
    process = start(
        tmp_path, *QUICK, *RANKS, "run_dir=run", "optimizer.max_skipped_in_a_row=2",
        "strategy.objective._target_=tests.faults.faulty.NanObjective",
        "+strategy.objective.first=2", "+strategy.objective.last=9",
        env={"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    code, output = end_of(process, within=200)
    assert code == 4, output[-3000:]
    assert output.count("2 updates in a row were skipped") == 1
    assert summary_of(tmp_path / "run")["status"] == "diverged"
    assert left_of(process, after=5) == ""


# --- other launchers ----------------------------------------------------------------------------


def test_torchruns_ranks_find_one_folder_and_go_on_in_it(tmp_path: Path, whole: Path) -> None:
    process = start(tmp_path, *QUICK, *RANKS, "resume=auto", launcher=TORCHRUN)
    until_line(process, "refill   2/4")
    kill(process, signal.SIGTERM)  # to torchrun, as a scheduler sends it
    code, output = end_of(process, within=DEADLINE)
    assert code != 0
    assert "interrupted after" in output, output[-3000:]
    assert left_of(process, after=5) == ""
    finish(tmp_path, *QUICK, *RANKS, "resume=auto", launcher=TORCHRUN)
    (run,) = (tmp_path / "outputs" / "arithmetic" / "tiny").glob("*/*/")
    assert_same_run(whole, run)


def test_slurms_tasks_find_one_folder(tmp_path: Path, whole: Path) -> None:
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1",
    }  # fmt: skip
    tasks = [
        start(tmp_path, *QUICK, *RANKS, env={**slurm, "SLURM_PROCID": n, "SLURM_LOCALID": n})
        for n in ("0", "1")
    ]
    for task in tasks:
        code, output = end_of(task, within=300)
        assert code == 0, output[-3000:]
    (run,) = (tmp_path / "outputs" / "arithmetic" / "tiny").glob("*/*/")
    assert_same_run(whole, run)


def test_ranks_that_sample_ahead_are_stopped_and_go_on(tmp_path: Path) -> None:
    ahead = (*QUICK, *RANKS, "rollout.overlap=true", "refills=3")
    finish(tmp_path, *ahead, "run_dir=whole")
    process = start(tmp_path, *ahead, "run_dir=run")
    until_line(process, "refill   1/3")
    kill(process, signal.SIGTERM)
    code, output = end_of(process, within=DEADLINE)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    finish(tmp_path, "resume=run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_each_rank_samples_with_a_vllm_engine_of_its_own(tmp_path: Path) -> None:
    finish(tmp_path, *QUICK, *RANKS, "rollout=vllm", "run_dir=two", "refills=2")
    finish(tmp_path, *QUICK, "rollout=vllm", "run_dir=one", "refills=2")
    found = [summary_of(tmp_path / name) for name in ("one", "two")]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[1]["engine_logp_gap"]["max"] < 1e-3
