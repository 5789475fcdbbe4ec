"""Monitors in real runs: one that stops, one that pulls, one that asks for what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerflow_lit.resume import checkpoint_of
from tests.faults.runs import assert_same_run, killed_at
from tests.integration.test_commands import rows_of, summary_of, train

FAST = ("debug=fast", "rollout=hf", "logger=none", "callbacks.evaluation.every_n_refills=9")
ALWAYS_BROKEN = "metric: rollout/length_mean, below: 1000"


def test_a_rule_stops_the_run_as_diverged_and_leaves_a_checkpoint_that_resumes(
    tmp_path: Path,
) -> None:
    """Broken from the start: the multirun goes on, and so does a resume without the rule."""
    ends = f"+monitor.rules.ends={{{ALWAYS_BROKEN}, patience: 2, action: stop}}"
    ran = train(tmp_path, "-m", *FAST, "refills=6", "seed=0,1", ends)
    runs = sorted(path.parent for path in tmp_path.glob("multirun/**/summary.json"))
    assert len(runs) == 2, "the first stop does not end the multirun"
    for run in runs:
        summary = summary_of(run)
        assert summary["status"] == "diverged"
        assert summary["refills"] == 2
        assert "monitor rule ends: rollout/length_mean" in summary["stopped_by"]
        assert not (run / "export").exists()
        point = checkpoint_of(run)
        assert point is not None
        assert (point.updates, point.refills) == (2, 1), "the checkpoint before the stop"
    assert ran.stdout.count("stopped at refill 2: monitor rule ends") == 2
    assert ran.stdout.count("diverged after 2 refills") == 2
    train(tmp_path, f"resume={runs[0]}", "refills=3", "~monitor.rules.ends")
    assert summary_of(runs[0])["status"] == "finished"
    assert [int(r["step"]) for r in rows_of(runs[0])] == list(range(7))


def test_a_single_run_that_diverged_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    ends = f"+monitor.rules.ends={{{ALWAYS_BROKEN}, patience: 1, action: stop}}"
    ran = train(tmp_path, *FAST, "refills=2", "run_dir=run", ends, check=False)
    assert ran.returncode == 4
    assert summary_of(tmp_path / "run")["status"] == "diverged"
    assert "diverged after 1 refills" in ran.stdout, "after all has been said"


@pytest.mark.faults
def test_a_pulled_run_lowers_alpha_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    pull = f"+monitor.rules.pull={{{ALWAYS_BROKEN}, patience: 2, action: pull}}"
    settings = (*FAST, "refills=4", "alpha=4", pull)
    train(tmp_path, *settings, "run_dir=whole")
    alphas = [float(r["train/alpha"]) for r in rows_of(tmp_path / "whole") if r["train/alpha"]]
    # refill 1 is within patience and recovers; pull is 1/2 after refill 2, 1/4 after refill 3
    assert alphas == [4.0, 4.0, 4.0, 4.0, 2.5, 2.5, 1.75, 1.75]
    killed_at(tmp_path, "refill   2/4", *settings, "run_dir=halves")
    train(tmp_path, "resume=halves")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_rule_for_a_metric_that_is_never_logged_ends_the_run_in_one_line(tmp_path: Path) -> None:
    wrong = "+monitor.rules.x={metric: rollout/repetitions, above: 1, patience: 1, action: warn}"
    ran = train(tmp_path, *FAST, wrong, check=False)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert "near: rollout/repetition" in ran.stderr
