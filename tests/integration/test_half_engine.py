"""An engine in 16 bits: the gap is shown, and the trainer's own log-probs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import QUICK, finish, rows_of, summary_of


@pytest.mark.faults
def test_a_bfloat16_engine_shows_its_gap_and_the_trainers_log_probs_are_kept(
    tmp_path: Path,
) -> None:
    printed = finish(
        tmp_path, *QUICK, "rollout=vllm", "model.engine_dtype=bfloat16", "refills=2", "run_dir=run"
    )
    rows = [r for r in rows_of(tmp_path / "run" / "metrics.csv") if r["rollout/staleness"]]
    assert [r["rollout/log_p_old_from_engine"] for r in rows] == ["0.0", "0.0"]
    for row in rows:
        assert 1e-3 < float(row["selfcheck/engine_logp_gap"]) < 1
        assert float(row["selfcheck/engine_logp_gap_mean"]) > 1e-4
        # the trainer's log-probs of the weights that it sampled from: every ratio is 1
        assert float(row["train/ess"]) == pytest.approx(1, abs=1e-5)
    gap = summary_of(tmp_path / "run")["engine_logp_gap"]
    assert gap["max"] == float(rows[-1]["selfcheck/engine_logp_gap"])
    assert gap["mean"] == float(rows[-1]["selfcheck/engine_logp_gap_mean"])
    assert f"engine gap {gap['max']:.3f} nats (mean {gap['mean']:.4f})" in printed
