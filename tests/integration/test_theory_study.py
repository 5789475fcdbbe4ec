"""The theory study runs as its README says, and its targets have what `docs/theory.md` claims."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_study_writes_its_files_and_its_bases_obey_the_theory(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "theory" / "run.py"
    few = ["--bases", "3", "--steps", "20", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path), *few],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("targets.png", "blocks.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    with (tmp_path / "targets.csv").open(newline="") as file:
        targets = [{k: v if k == "kind" else float(v) for k, v in r.items()}
                   for r in csv.DictReader(file)]  # fmt: skip
    assert {row["kind"] for row in targets} == {"plain", "rare end"}
    for row in targets:
        if row["alpha"] > 1:
            assert row["log_z_q75"] < 0
            assert row["length_la_tb_median"] >= row["length_power_median"]
        if abs(row["alpha"] - 1) < 0.05 and row["alpha"] != 1:
            ratio = row["distortion_formula_median"] / row["distortion_median"]
            assert 0.8 < ratio < 1.25
    with (tmp_path / "blocks.csv").open(newline="") as file:
        trained = list(csv.DictReader(file))
    for size in ("1", "2", "4", "8"):
        curve = [r for r in trained if r["block_size"] == size and r["alpha"] == "0.5"]
        first, last = (
            max(float(r["total_variation"]) for r in curve if r["step"] == step)
            for step in ("0", "20")
        )
        assert last < first
