"""Two ranks over NCCL, a GPU each. Never run by us: it takes two GPUs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.faults.runs import finish

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

QUICK = (
    "debug=fast", "logger=none", "rollout=hf", "refills=2", "trainer.precision=32-true",
    "callbacks.evaluation.max_prompts=7",
)  # fmt: skip


def test_two_gpus_train_as_one_does(tmp_path: Path) -> None:
    for name, devices in (("one", 1), ("two", 2)):
        finish(tmp_path, "trainer=ddp", f"trainer.devices={devices}", *QUICK, f"run_dir={name}")
    losses = []
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "finished"
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            losses.append([float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]])
    # the first update is on the same tokens; later ones may differ by a token on a GPU
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
