"""The files of a run, and finding a run to resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from powerflow_lit import run_folder
from powerflow_lit.assembly import wandb_mode
from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.identity import config_hash
from powerflow_lit.continuing import expand_resume
from powerflow_lit.metrics_csv import MetricsCsv
from powerflow_lit.types import Prompt, Trajectory


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_one_step_share_a_row_whenever_they_come(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path)
    log.log_metrics({"val/x": 0.5, "refill": 0}, step=0)
    log.log_metrics({"train/loss": 2.0, "refill": 1}, step=1)
    log.log_metrics({"train/loss": 1.0, "refill": 1}, step=2)
    log.log_metrics({"val/x": 0.7, "refill": 1}, step=2)
    rows = rows_of(tmp_path)
    assert [r["step"] for r in rows] == ["0", "1", "2"]
    assert list(rows[0]) == ["step", "refill", "val/x", "train/loss"]
    assert [r["val/x"] for r in rows] == ["0.5", "", "0.7"]
    assert [r["train/loss"] for r in rows] == ["", "2.0", "1.0"]


def test_a_resumed_run_cuts_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path)
    for step in range(6):
        log.log_metrics({"train/loss": float(step), "refill": step // 2}, step=step)
    resumed = MetricsCsv(tmp_path, keep_until=3)
    resumed.log_metrics({"train/loss": 40.0, "refill": 2}, step=4)
    assert [(r["step"], r["train/loss"]) for r in rows_of(tmp_path)] == [
        ("0", "0.0"), ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "40.0"),
    ]  # fmt: skip


def test_samples_say_what_was_asked_answered_and_scored(tmp_path: Path) -> None:
    trajectory = Trajectory(
        prompt=Prompt(3, "Compute 1 + 1.", "2"), group=0, prompt_ids=(1,), response_ids=(5, 2),
        response="2", truncated=False, formatted=False, correct=False, policy_version=0,
        log_p_old=torch.tensor([-0.5, -0.25]), log_p_base=torch.tensor([-1.0, -0.5]),
    )  # fmt: skip
    for refill in (1, 2):
        run_folder.append_samples(tmp_path, run_folder.sample_rows(refill, [trajectory], -0.5))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"refill": 1, "pro')  # killed while writing
    run_folder.cut_samples(tmp_path, 1)
    (row,) = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert row["refill"] == 1
    assert row["format_penalty"] == -0.5
    assert row["prompt"] == "Compute 1 + 1."
    assert (row["length"], row["log_p_base"], row["log_pf"]) == (2, -1.5, -0.75)


def test_resuming_a_folder_brings_along_what_was_typed_for_it(tmp_path: Path) -> None:
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(["alpha=2", "run_dir=elsewhere"]))
    found = expand_resume(["refills=9", f"resume={tmp_path}"])
    assert found == ["alpha=2", f"run_dir={tmp_path}", "refills=9", f"resume={tmp_path}"]
    assert expand_resume(["alpha=2", "resume=auto"]) == ["alpha=2", "resume=auto"]
    with pytest.raises(ConfigError, match="no run folder there"):
        expand_resume(["resume=nowhere"])


def test_runs_that_would_do_the_same_share_a_hash() -> None:
    one = {"alpha": 2.0, "run_dir": "a", "resume": None, "logger": {"name": "wandb"}}
    assert config_hash(one) == config_hash({**one, "run_dir": "b", "resume": "auto"})
    assert config_hash(one) != config_hash({**one, "alpha": 4.0})


def test_wandb_is_online_only_with_a_key_or_a_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("online") == "online"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode("auto") == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
