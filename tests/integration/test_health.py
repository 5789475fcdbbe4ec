"""What a run says of its rollouts: once for each streak, over a resume too, and in its summary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.training import run
from tests.tiny_models import make_scripted_model
from tests.unit.test_degenerate import SCRIPTS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trained(folder: Path, *overrides: str) -> list[str]:
    """The warnings in the summary of a run in this process, in `folder`/run."""
    run_dir = folder / "run"
    fixed = (
        "debug=fast", "rollout=hf", "logger=none", f"run_dir={run_dir}", "monitor=default",
        f"model.path={folder / 'bent'}", "rollout.max_new_tokens=6", "callbacks.export=false",
        "callbacks.evaluation.max_prompts=2", "callbacks.evaluation.every_n_refills=9",
    )  # fmt: skip
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = train_config(compose("train", [*fixed, *overrides]))
    run(config, run_dir, overrides)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    return summary["warnings"]


def test_what_is_said_of_degenerate_rollouts_is_said_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scripted_model(tmp_path / "bent", SCRIPTS["truncated"])
    first = trained(tmp_path, "refills=2")
    assert [w.split(":")[0] for w in first] == ["refill 1"]
    assert first[0].startswith("refill 1: all 16 responses are cut at rollout.max_new_tokens=6: ")
    resumed = trained(tmp_path, "refills=4", f"resume={tmp_path / 'run'}")
    assert resumed[0] == first[0]
    rules = [w for w in resumed[1:] if "monitor rule truncation: " in w]
    assert rules == resumed[1:2], "the rule's third refill in a row comes after the resume"
    assert rules[0].startswith("refill 3: monitor rule truncation: rollout/truncated_frac is 1, ")
    assert sum("all 16 responses" in w for w in resumed) == 1
    assert capsys.readouterr().out.count("all 16 responses are cut") == 1
