"""What the README claims of the default commands, run as typed. Minutes each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_commands import only_run, rows_of, summary_of, train

pytestmark = pytest.mark.slow


def val(metrics: dict[str, float], name: str) -> float:
    return metrics[f"val/{name}"]


def trained(folder: Path, *overrides: str) -> dict[str, Any]:
    train(folder, *overrides)
    return summary_of(only_run(folder))


def test_powerflow_beats_every_decoding_of_its_base_at_stable_length(tmp_path: Path) -> None:
    summary = trained(tmp_path)
    base, final = summary["base"], summary["final"]
    decodings = [base, *summary["base_decodings"].values()]
    best = max(val(m, "pass@1") for m in decodings)
    assert {"T=0.7", "T=0.5", "T=0.25", "greedy"} == set(summary["base_decodings"])
    assert 0.20 <= val(base, "avg@16") <= 0.50
    assert val(base, "pass@16") >= 0.90
    assert val(final, "avg@16") >= best + 0.05
    assert val(final, "avg@16") >= val(base, "avg@16") + 0.25
    assert 0.8 <= val(final, "length_mean") / val(base, "length_mean") <= 2.0
    assert val(final, "format_rate") >= 0.95
    assert val(final, "repetition") <= 2 * val(base, "repetition")
    # the engine still agrees with the trainer, and the policy nears the target on base samples
    run = only_run(tmp_path)
    rows = rows_of(run)
    gaps = [float(r["selfcheck/engine_logp_gap"]) for r in rows if r["selfcheck/engine_logp_gap"]]
    assert len(gaps) >= 40
    assert max(gaps) < 1e-4
    name = "selfcheck/residual_std_on_base"
    spread = [float(r[name]) for r in rows if r[name]]
    assert spread[-1] < 0.9 * spread[0]
    # what it exported scores the same when evaluated on its own, and report reads the folder
    command = [sys.executable, "-m", "powerflow_lit.evaluate", f"run={run}", "output=scored"]
    only_t1 = "decodings=[{temperature: 1.0, min_p: 0.0}]"
    subprocess.run([*command, only_t1], cwd=tmp_path, check=True, capture_output=True)
    record = json.loads((tmp_path / "scored" / "eval.json").read_text())
    scored = record["benchmarks"]["arithmetic"]["T=1"]["metrics"]
    assert val(scored, "avg@16") == pytest.approx(val(final, "avg@16"), abs=1e-9)
    report = [sys.executable, "-m", "powerflow_lit.report", f"runs=[{run}]", "output=pages"]
    subprocess.run(report, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "pages" / "curves.png").stat().st_size > 10_000


def test_tb_traj_collapses_the_length(tmp_path: Path) -> None:
    summary = trained(tmp_path, "strategy=tb_traj")
    base, final = summary["base"], summary["final"]
    assert summary["refills"] >= 40
    assert val(final, "length_mean") < 0.5 * val(base, "length_mean")
    assert val(final, "avg@16") < val(base, "avg@16")


def test_tb_token_is_hacked_by_repetition(tmp_path: Path) -> None:
    summary = trained(tmp_path, "strategy=tb_token")
    assert val(summary["final"], "repetition") >= 4 * val(summary["base"], "repetition")


def test_flattening_widens_the_creative_model_without_breaking_it(tmp_path: Path) -> None:
    summary = trained(tmp_path, "task=creative", "alpha=0.5")
    base, final = summary["base"], summary["final"]
    assert val(final, "quality") >= 0.95
    assert val(final, "unique_valid@16") > val(base, "unique_valid@16")
    assert val(final, "modes@16") >= 1.25 * val(base, "modes@16")
    plain = {n: m for n, m in summary["base_decodings"].items() if "min_p" not in n}
    assert {"T=1.1", "T=1.25", "T=1.5", "T=2"} == set(plain)
    for metrics in plain.values():
        reaches_modes = val(metrics, "modes@16") >= val(final, "modes@16")
        assert not (reaches_modes and val(metrics, "quality") >= val(final, "quality"))


def test_tb_traj_drifts_long_and_loses_validity_when_flattening(tmp_path: Path) -> None:
    summary = trained(tmp_path, "task=creative", "strategy=tb_traj")
    base, final = summary["base"], summary["final"]
    assert val(final, "length_mean") > 1.25 * val(base, "length_mean")
    assert val(final, "quality") < val(base, "quality") - 0.2
