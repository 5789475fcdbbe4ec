"""Interrupted runs go on as if nothing had happened. More of it: tests/faults."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import (
    QUICK,
    assert_same_run,
    end_of,
    finish,
    kill,
    killed_at,
    left_of,
    rows_of,
    start,
    summary_of,
    until_line,
)


@pytest.mark.parametrize("engine", ["vllm", pytest.param("hf", marks=pytest.mark.faults)])
def test_two_and_two_refills_equal_four_bit_by_bit(tmp_path: Path, engine: str) -> None:
    settings = (*QUICK, f"rollout={engine}")
    finish(tmp_path, *settings, "run_dir=whole")
    killed_at(tmp_path, "refill   2/4", *settings, "run_dir=halves")
    finish(tmp_path, "resume=halves")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


LENGTH = ("strategy=powerflow_length", "length_control=target", "rollout=hf")


@pytest.mark.parametrize(
    "settings",
    [
        ("length_control.scope=prompt", "buffer.max_staleness=1", "buffer.prompts_per_update=3"),
        pytest.param(("rollout.overlap=true", "log_z=group"), marks=pytest.mark.faults),
    ],
    ids=["prompt", "overlap"],
)
def test_a_resumed_run_goes_on_with_its_price_of_length(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    settings = (*QUICK, *LENGTH, *settings)
    finish(tmp_path, *settings, "run_dir=whole")
    killed_at(tmp_path, "refill   2/4", *settings, "run_dir=halves")
    finish(tmp_path, "resume=halves")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    rows = rows_of(tmp_path / "whole" / "metrics.csv")
    prices = [r["train/length_price"] for r in rows if r["train/length_price"]]
    assert len(set(prices)) == 4  # one for each refill
    assert len({r["train/length_target"] for r in rows} - {""}) == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    "chosen",
    [
        ("alpha_schedule=target_entropy", "alpha_schedule.scope=prompt", "buffer.max_staleness=1"),
        ("alpha_schedule=target_kl", "rollout.overlap=true"),
    ],
)
def test_a_run_whose_alpha_follows_a_target_resumes_bit_by_bit(
    tmp_path: Path, chosen: tuple[str, ...]
) -> None:
    settings = (*QUICK, "rollout=hf", *chosen)
    finish(tmp_path, *settings, "run_dir=whole")
    alphas = [r["train/alpha"] for r in rows_of(tmp_path / "whole/metrics.csv") if r["train/alpha"]]
    assert len(set(alphas)) == 4, "one a refill"
    killed_at(tmp_path, "refill   2/4", *settings, "run_dir=halves")
    finish(tmp_path, "resume=halves")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    summary = summary_of(tmp_path / "halves")
    assert summary["automatic_alpha"] == summary_of(tmp_path / "whole")["automatic_alpha"]


@pytest.mark.faults
def test_ctrl_c_leaves_a_resumable_checkpoint_and_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, *QUICK, "rollout=hf", "refills=500", "run_dir=run", "logger=wandb")
    until_line(process, "refill   3/500")
    kill(process, signal.SIGINT)
    code, output = end_of(process, within=60)
    assert code == 128 + signal.SIGINT
    assert "continue with: python -m powerflow_lit.train resume=run" in output
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert left_of(process) == "", "no process of the run's group is left"
    # a run without an export yet is evaluated from its checkpoint
    command = [sys.executable, "-m", "powerflow_lit.evaluate", "run=run", "rollout=hf"]
    small = ["samples_per_prompt=1", "decodings=[{temperature: 0.0, min_p: 0.0}]", "output=scored"]
    subprocess.run([*command, *small], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "scored" / "eval.json").exists()


@pytest.mark.faults
def test_resume_auto_finds_the_unfinished_twin(tmp_path: Path) -> None:
    settings = [*QUICK, "rollout=hf", "alpha=2"]
    killed_at(tmp_path, "refill   1/4", *settings)
    finish(tmp_path, *settings, "resume=auto")
    (metrics,) = tmp_path.glob("outputs/**/metrics.csv")
    assert summary_of(metrics.parent)["status"] == "finished"
    assert [int(r["step"]) for r in rows_of(metrics)] == list(range(9))
