"""Real runs whose numbers go wrong: skipped, refused, rebuilt, stopped, and said so."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from powerflow_lit.resume import checkpoint_of
from tests.faults.runs import end_of, last_checkpoint, start
from tests.tiny_models import make_scripted_model
from tests.unit.test_degenerate import SCRIPTS

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
HF = (
    "debug=fast", "rollout=hf", "logger=none", "refills=4", "callbacks.evaluation.max_prompts=8",
    "callbacks.evaluation.every_n_refills=9", "run_dir=run",
)  # fmt: skip


def ran(folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of a run in `folder`/run that may take parts from `tests.faults`."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return end_of(start(folder, *overrides, env={"PYTHONPATH": path}), within=300)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def losses_of(folder: Path) -> list[str]:
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if int(row["step"]) > 0]


def nan_loss(first: int, last: int) -> tuple[str, ...]:
    return (
        "strategy.objective._target_=tests.faults.faulty.NanObjective",
        f"+strategy.objective.first={first}",
        f"+strategy.objective.last={last}",
    )


def is_finite(state: Mapping[str, torch.Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in state.values())


def test_a_nan_loss_once_is_skipped_and_counted_and_the_run_finishes(tmp_path: Path) -> None:
    code, printed = ran(tmp_path, *HF, *nan_loss(3, 3))
    assert code == 0, printed
    assert "update 3 skipped: the loss is nan" in printed
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["skipped_steps"], summary["steps"]) == ("finished", 1, 8)
    assert [bool(loss) for loss in losses_of(tmp_path)] == [True] * 2 + [False] + [True] * 5
    assert is_finite(last_checkpoint(tmp_path / "run")["state_dict"])
    assert (tmp_path / "run" / "export").exists()


def test_nan_losses_in_a_row_end_the_run_as_diverged_with_its_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    """From update 4 on, the last of refill 2, so that the checkpoint of refill 1 is the last."""
    code, printed = ran(tmp_path, *HF, *nan_loss(4, 99), "optimizer.max_skipped_in_a_row=3")
    assert code == 4, printed
    assert "Traceback" not in printed
    summary = summary_of(tmp_path)
    assert summary["status"] == "diverged"
    assert summary["skipped_steps"] == 3
    assert "3 updates in a row were skipped, up to update 6" in summary["stopped_by"]
    assert "the loss is nan" in summary["stopped_by"]
    assert not (tmp_path / "run" / "export").exists()
    point = checkpoint_of(tmp_path / "run")
    assert point is not None
    assert (point.updates, point.refills) == (2, 1), "updates and refills of the last good one"
    assert is_finite(last_checkpoint(tmp_path / "run")["state_dict"])
    # with a sound objective it goes on from there
    sound = "strategy.objective._target_=tests.faults.faulty.NanObjective"
    code, printed = ran(tmp_path, "resume=run", sound, "strategy.objective.last=0")
    assert code == 0, printed
    assert summary_of(tmp_path)["status"] == "finished"
    assert summary_of(tmp_path)["steps"] == 8


@pytest.mark.parametrize(
    ("engine", "refill", "words"),
    [
        ("StaleEngine", 1, "stale weights: the engine hf was given those of update 2"),
        ("OtherEngine", 0, "refill 1: engine and trainer disagree by "),
    ],
)
def test_rollouts_of_another_policy_end_the_run_before_any_update_of_theirs(
    tmp_path: Path, engine: str, refill: int, words: str
) -> None:
    code, printed = ran(tmp_path, *HF, f"rollout.engine._target_=tests.faults.faulty.{engine}")
    assert code == 2, printed
    assert "Traceback" not in printed
    summary = summary_of(tmp_path)
    assert summary["status"] == "failed"
    assert words in summary["error"]
    assert f"error: {summary['error']}" in printed
    assert (summary["refills"], summary["steps"]) == (refill, 2 * refill)
    if engine == "OtherEngine":
        numbers = ("of the 8 trajectories", "limit 0.01", "engine hf in float32",
                   "trainer in float32 with precision 32-true")  # fmt: skip
        assert all(part in summary["error"] for part in numbers)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_policy_that_overflows_ends_the_run_as_diverged(tmp_path: Path, engine: str) -> None:
    """An absurd rate makes a policy of finite weights that no engine can sample from."""
    code, printed = ran(tmp_path, *HF, f"rollout={engine}", "optimizer.lr=1e36")
    assert "Traceback" not in printed
    assert code == 4, printed
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["engine_rebuilds"]) == ("diverged", 1)
    assert "after update 2 the policy's weights are finite, but " in summary["stopped_by"]
    assert f"from an engine {engine} built anew too" in summary["stopped_by"]
    assert summary["refills"] == 1
    assert checkpoint_of(tmp_path / "run") is None, "refill 1 ended in a skipped update"
    assert not (tmp_path / "run" / "export").exists()


def test_weights_that_are_not_numbers_are_never_synced_and_end_the_run(tmp_path: Path) -> None:
    engine = "rollout.engine._target_=tests.faults.faulty.CorruptingEngine"
    code, printed = ran(tmp_path, *HF, engine)
    assert "Traceback" not in printed
    assert code == 4, printed
    summary = summary_of(tmp_path)
    assert summary["status"] == "diverged"
    assert summary["stopped_by"].startswith(
        "sync refused: model.layers.1.mlp.up_proj.weight holds NaN or infinity at 1 of 24576 places"
    )
    assert (summary["refills"], summary["engine_rebuilds"]) == (1, 0)
    assert is_finite(last_checkpoint(tmp_path / "run")["state_dict"]), "the checkpoint of refill 1"


def test_a_poisoned_vllm_engine_is_built_anew_and_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    """Bit by bit: NaN outlives a good sync in the first engine, and the second has none of it."""
    settings = (*HF, "rollout=vllm", "refills=3")
    poisoned = "rollout.engine._target_=tests.faults.faulty.PoisonedVllmEngine"
    (tmp_path / "ill").mkdir()
    (tmp_path / "well").mkdir()
    code, printed = ran(tmp_path / "ill", *settings, poisoned)
    assert code == 0, printed
    (line,) = [x for x in printed.splitlines() if x.startswith("NaN while poisoned")]
    counts = [int(part.split()[-1]) for part in line.split(",")]
    assert counts[0] == 16
    assert counts[1] > 0, "else the premise is gone: vLLM recovers by itself"
    summary = summary_of(tmp_path / "ill")
    assert (summary["status"], summary["engine_rebuilds"]) == ("finished", 1)
    (warning,) = [w for w in summary["warnings"] if "built anew" in w]
    assert warning.startswith("refill 2: the engine vllm is built anew after update 2: log-probs")
    assert printed.count("is built anew") == 1
    code, printed = ran(tmp_path / "well", *settings)
    assert code == 0, printed
    assert summary_of(tmp_path / "well")["engine_rebuilds"] == 0
    runs = [tmp_path / name / "run" for name in ("well", "ill")]
    expected, found = (last_checkpoint(run)["state_dict"] for run in runs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("script", "choices", "words"),
    [
        ("empty", ("strategy=powerflow",), "refill 1: all 16 responses are empty"),
        ("truncated", ("strategy=tb_traj", "log_z=group"), "refill 1: all 16 responses are cut at"),
        ("identical", ("strategy=rl_traj",), "refill 1: all 16 responses are the same:"),
        ("one_token", ("strategy=tb_token", "log_z=ema"), "refill 1: all 16 responses are one tok"),
    ],
)
def test_a_run_on_degenerate_rollouts_finishes_with_finite_losses_and_one_warning(
    tmp_path: Path, script: str, choices: tuple[str, ...], words: str
) -> None:
    make_scripted_model(tmp_path / "bent", SCRIPTS[script])
    bent = (f"model.path={tmp_path / 'bent'}", "rollout.max_new_tokens=8")
    code, printed = ran(tmp_path, *HF, *bent, *choices, "callbacks.evaluation.samples_per_prompt=2")
    assert code == 0, printed
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert summary["skipped_steps"] == 0
    losses = torch.tensor([float(loss) for loss in losses_of(tmp_path)])
    assert len(losses) == 8
    assert bool(losses.isfinite().all())
    assert sum(w.startswith(words) for w in summary["warnings"]) == 1
    assert printed.count(f"warning: {words}") == 1, "once for the streak, not at each refill"


def test_a_stop_rule_ends_a_run_whose_responses_are_all_cut_or_empty(tmp_path: Path) -> None:
    for script, rule in (("truncated", "truncation"), ("empty", "length_floor")):
        folder = tmp_path / script
        make_scripted_model(folder / "bent", SCRIPTS[script])
        code, printed = ran(
            folder, *HF, f"model.path={folder / 'bent'}", "rollout.max_new_tokens=8",
            "monitor=stop", "~monitor.rules.format", "refills=6",
        )  # fmt: skip
        assert "Traceback" not in printed, printed
        assert code == 4, printed
        summary = summary_of(folder)
        assert (summary["status"], summary["refills"]) == ("diverged", 3)
        assert f"monitor rule {rule}: " in summary["stopped_by"]
