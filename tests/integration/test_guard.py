"""A guarded run with either engine: what it samples, what it keeps, what it logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.rollout.buffer import unpack
from tests.integration.test_commands import rows_of, summary_of, train

GUARDED = (
    "debug=fast", "guard=min_p", "task=creative", "logger=none", "run_dir=run",
    "callbacks.evaluation.max_prompts=16",
)  # fmt: skip
MIN_P = 0.05


def buffer_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Packed trajectories by refill."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    refills: dict[int, list[dict[str, Any]]] = state["RolloutDataModule"]["buffer"]["refills"]
    return refills


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=pytest.mark.slow), "hf"])
def test_an_engine_samples_what_the_trainer_allows_and_the_run_learns_from_it(
    tmp_path: Path, engine: str
) -> None:
    """One refill of several updates: the sets are the base's, recomputed here by a plain pass."""
    updates = ("refills=1", "buffer.updates_per_refill=4", "rollout.samples_per_prompt=16")
    train(tmp_path, *GUARDED, *updates, f"rollout={engine}", "tokens_per_microbatch=256")
    base = AutoModelForCausalLM.from_pretrained(folder_of("tiny_instruct")).double()
    (packed,) = buffer_of(tmp_path / "run").values()
    removed = []
    for trajectory in map(unpack, packed):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.response_ids]])
        with torch.no_grad():
            p = base(input_ids=ids).logits[0, len(trajectory.prompt_ids) - 1 : -1].softmax(-1)
        assert trajectory.allowed is not None
        for t, ids_kept in enumerate(trajectory.allowed.padded().tolist()):
            token, kept = trajectory.response_ids[t], set(ids_kept) - {-1}
            share = (p[t] / p[t].max()).tolist()
            assert share[token] >= MIN_P * (1 - 1e-3), "sampled beyond the border"
            assert {v for v, s in enumerate(share) if s >= MIN_P * (1 + 1e-3)} <= kept
            assert kept <= {v for v, s in enumerate(share) if s >= MIN_P * (1 - 1e-3)}
            mass = float(p[t, list(kept)].sum())
            renormalised = math.log(float(p[t, token]) / mass)
            # at the first refill policy, behaviour and base are one model
            assert float(trajectory.log_p_old[t]) == pytest.approx(renormalised, abs=1e-4)
            assert float(trajectory.log_p_base[t]) == pytest.approx(renormalised, abs=1e-4)
            removed.append(1 - mass)
    rows = rows_of(tmp_path / "run")
    assert float(rows[1]["rollout/guard_removed_mass"]) == pytest.approx(
        sum(removed) / len(removed), abs=1e-5
    )
    assert sum(removed) > 0, "the guard had something to remove"
    assert float(rows[1]["selfcheck/engine_logp_gap"]) < 1e-4
    assert float(rows[0]["selfcheck/residual_std_on_base"]) < 5
    assert math.isfinite(float(rows[-1]["selfcheck/residual_std_on_base"]))
    assert all(float(r["train/grad_norm"]) > 0 for r in rows[1:])
    assert summary_of(tmp_path / "run")["skipped_steps"] == 0
    assert float(rows[1]["train/is_weight_min"]) == pytest.approx(1, abs=1e-3)


def test_stale_trajectories_train_under_their_own_sets(tmp_path: Path) -> None:
    stale = ("buffer.max_staleness=2", "buffer.updates_per_refill=4", "refills=3")
    chosen = ("rollout=hf", "log_z=group", "optimizer.lr=2e-3", "buffer.log_p_old=engine")
    train(tmp_path, *GUARDED, *stale, *chosen)
    held = buffer_of(tmp_path / "run")
    assert sorted(held) == [0, 1, 2]
    assert all("allowed" in t for refill in held.values() for t in refill)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 13
    assert all(math.isfinite(float(r["train/loss"])) for r in rows[1:])
    assert summary_of(tmp_path / "run")["skipped_steps"] == 0
