"""Which rank a process is, how many there will be, and what the first tells the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from powerflow_lit import meeting
from powerflow_lit.config.processes import TOLD, devices_asked, rank_here, started
from powerflow_lit.config.rules import ConfigError

NAMES = (
    "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_JOB_NAME", TOLD,
)  # fmt: skip
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "train"}
LIGHTNING = {TOLD: json.dumps({"run_dir": "a", "checkpoint": None, "ranks": 2}), "LOCAL_RANK": "1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),  # left over, of nobody's
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),
        (LIGHTNING, (1, 2)),
        (SLURM, (3, 4)),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),  # a job of one task, as in a sweep
        # torchrun within a SLURM job: its ranks count, as for Lightning
        ({**SLURM, "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),
    ],
)
def test_a_process_is_the_rank_that_its_launcher_says(
    env: dict[str, str], expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert started() == expected
    assert rank_here() == (expected or (0, 0))[0]


@pytest.mark.parametrize(
    ("devices", "count"),
    [(1, 1), (4, 4), ("4", 4), ([0, 2], 2), ("0,2", 2), ("0,", 1), ("auto", None), (-1, None),
     ("-1", None)],
)  # fmt: skip
def test_devices_are_counted_as_lightning_counts_them(devices: Any, count: int | None) -> None:
    assert devices_asked({"devices": devices}) == count


def test_lightnings_children_are_told_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOLD, "")  # to be taken back at the end
    monkeypatch.delenv(TOLD)
    decision = meeting.Decision("runs/a", "runs/a/checkpoints/last.ckpt", 2)
    meeting.decide(decision)
    assert meeting.hear() == decision
    meeting.over()  # in the first rank, which may begin another run
    assert started() is None


def test_a_run_that_the_first_rank_refuses_is_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOLD, meeting.CALLED_OFF)
    with pytest.raises(ConfigError, match="rank 0 does not begin the run"):
        meeting.hear()
