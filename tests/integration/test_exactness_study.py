"""The exactness study runs as its README says and shows objectives on their way to the target."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_study_writes_its_files_and_total_variation_falls_on_all_strings(
    tmp_path: Path,
) -> None:
    script = ROOT / "experiments" / "exactness" / "run.py"
    command = [str(script), "--output", str(tmp_path), "--steps", "40", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "| powerflow |" in done.stdout
    for name in ("total_variation.png", "log_z.png", "failures.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 40

    with (tmp_path / "results.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["sampling"] in ("uniform", "base", "policy")]
    curves: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        if not row["variant"]:
            key = row["objective"], row["alpha"], row["sampling"]
            curves.setdefault(key, {})[int(row["step"])] = float(row["total_variation"])
    assert {key[0] for key in curves} == {
        "powerflow", "la_tb", "tb_traj", "tb_token", "tb_token_power", "rl_traj", "rl_token",
    }  # fmt: skip
    for key, curve in curves.items():
        assert sorted(curve)[0] == 0, key
        assert sorted(curve)[-1] == 40, key
        if key[:2] != ("tb_token", "4"):  # 40 steps of log Z from 0 towards -8.9: it rises at first
            assert curve[40] < curve[0], key
