"""Two ranks on gloo, of which one dies: the other does not wait for it for ever."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.runs import QUICK, end_of, left_of, start, until_line

pytestmark = pytest.mark.faults

RANKS = ("trainer.devices=2", "+trainer.strategy=ddp")
DEADLINE = 60.0  # seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_takes_the_other_with_it(tmp_path: Path, rank: int) -> None:
    # resume=auto: the second rank finds the folder that the first has begun, and may join it
    process = start(
        tmp_path, *QUICK, *RANKS, "rollout=hf", "refills=50", "run_dir=run", "resume=auto",
        "callbacks.evaluation.every_n_refills=50",
    )  # fmt: skip
    until_line(process, "refill   1/50")
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    (second,) = map(int, found.stdout.split())
    os.kill((process.pid, second)[rank], signal.SIGKILL)
    code, _ = end_of(process, within=DEADLINE)  # the pipe closes when both are gone
    assert code != 0
    assert left_of(process, after=5) == ""
