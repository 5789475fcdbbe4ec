"""`trainer=fsdp` on two ranks over gloo: what ends one of them ends both, and the run goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.runs import (
    QUICK,
    STEP,
    assert_same_run,
    end_of,
    finish,
    left_of,
    start,
    summary_of,
    until_line,
)
from tests.faults.test_ranks import DEADLINE, ranks_of

pytestmark = pytest.mark.faults

RANKS = (
    "trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "rollout=hf",
    "tokens_per_microbatch=200", "model.gradient_checkpointing=true",
)  # fmt: skip
# the parts are whole, and the file that names them is about to be renamed into place
NAMED = "powerflow_lit.checkpoints:link#1"
OURS = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has ended."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, *QUICK, *RANKS, "run_dir=run")
    return folder / "run"


def test_a_signal_to_one_rank_stops_and_saves_them_all(tmp_path: Path, whole: Path) -> None:
    process = start(tmp_path, *QUICK, *RANKS, "run_dir=run")
    until_line(process, "refill   1/4")
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    code, output = end_of(process, within=DEADLINE)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert left_of(process, after=5) == ""
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("moment", [f"{STEP}#3", NAMED])
def test_a_run_whose_ranks_were_killed_goes_on_as_if_they_were_not(
    tmp_path: Path, whole: Path, moment: str
) -> None:
    process = start(tmp_path, *QUICK, *RANKS, "run_dir=run", fault=(moment, "SIGKILL"))
    code, _ = end_of(process, within=200)
    assert code == -signal.SIGKILL
    assert left_of(process, after=DEADLINE) == ""
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.glob("shards-*"))) == (2 if moment == NAMED else 1)
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")
    assert len(list(checkpoints.glob("shards-*"))) == 2  # of the last and the one before


def test_what_one_rank_refuses_between_two_passes_ends_all_with_its_word(tmp_path: Path) -> None:
    process = start(
        tmp_path, *QUICK, *RANKS, "run_dir=run", "buffer.log_p_old=trainer",
        "rollout.engine._target_=tests.faults.faulty.OtherEngineOnRankOne", env=OURS,
    )  # fmt: skip
    code, output = end_of(process, within=200)
    assert code == 2, output[-3000:]
    assert "error: rank 1: refill 1: engine and trainer disagree by" in output
    assert "Traceback" not in output
    assert left_of(process, after=5) == ""


def test_all_ranks_skip_an_update_without_a_loss_and_stop_at_too_many(tmp_path: Path) -> None:
    ill = (
        "strategy.objective._target_=tests.faults.faulty.NanObjective",
        "+strategy.objective.first=2", "optimizer.max_skipped_in_a_row=2",
    )  # fmt: skip
    process = start(
        tmp_path, *QUICK, *RANKS, *ill, "+strategy.objective.last=2", "run_dir=one", env=OURS
    )
    code, output = end_of(process, within=300)
    assert code == 0, output[-3000:]
    assert summary_of(tmp_path / "one")["skipped_steps"] == 1
    process = start(
        tmp_path, *QUICK, *RANKS, *ill, "+strategy.objective.last=9", "run_dir=many", env=OURS
    )
    code, output = end_of(process, within=300)
    assert code == 4, output[-3000:]
    assert output.count("2 updates in a row were skipped") == 1
