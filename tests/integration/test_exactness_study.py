"""The studies on the enumerable language run as their READMEs say."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ran(script: str, output: Path) -> str:
    """What the study prints in its shortest form, of 40 steps and one seed."""
    options = ["--output", str(output), "--steps", "40", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_study_writes_its_files_and_total_variation_falls_on_all_strings(
    tmp_path: Path,
) -> None:
    output = ran("exactness/run.py", tmp_path)
    assert "| powerflow |" in output
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


@pytest.mark.slow
def test_the_study_of_base_samples_writes_its_files_and_every_case_of_its_table(
    tmp_path: Path,
) -> None:
    output = ran("off_policy/exact.py", tmp_path)
    with (tmp_path / "exact.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {(r["base"], r["rates"], r["base_share"], r["weight"]) for r in rows}
    assert {int(r["step"]) for r in rows} >= {0, 40}
    assert sum(line.startswith("| ") for line in output.splitlines()) == len(cases) + 1
    assert {weight for *_, weight in cases} == {"none", "eq. 10", "truncated", "mixture"}
    assert (tmp_path / "exact.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "exact.json").read_text())["rates"]["fast"] == [0.5, 0.01]
