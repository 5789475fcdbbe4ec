"""`rollout.base_share` and `buffer.min_ess` in whole runs: who drew what, from which weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model, load_tokenizer
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.types import Sampling
from tests.faults.runs import assert_same_run, last_checkpoint, rows_of
from tests.integration.test_overlap import SMALL, one_thread, trained  # noqa: F401 - autouse
from tests.two_ranks import as_torchrun_starts

SHARE = ("rollout.base_share=0.5", "refills=3")  # 2 of 4 rollouts, once the policy has moved
STALE = ("buffer.max_staleness=2", "buffer.prompts_per_update=4", "buffer.min_ess=0.6")


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "run"
    if request.param == "hf":
        return trained(folder, *SHARE)
    return trained(folder, *SHARE, small=tuple(s for s in SMALL if "rollout" not in s))


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )


def held(folder: Path) -> list[dict[str, Any]]:
    refills = last_checkpoint(folder)["RolloutDataModule"]["buffer"]["refills"]
    return [t for refill in sorted(refills) for t in refills[refill]]


def samples(folder: Path, refill: int) -> list[dict[str, Any]]:
    """Every rollout of a refill, from 1."""
    rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [row for row in rows if row["refill"] == refill]


def log_probs(model: PreTrainedModel, trajectory: dict[str, Any]) -> Tensor:
    """Of a response, (L,) nats, without any code of the trainer's."""
    prompt, response = trajectory["prompt_ids"], trajectory["response_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    places = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return places.gather(1, torch.tensor(response)[:, None])[:, 0]


def test_the_first_refill_is_the_policys_and_later_ones_hold_the_bases_share(mixed: Path) -> None:
    for refill, of_base in ((1, [False] * 4), (2, [False, False, True, True])):
        rows = samples(mixed, refill)
        assert [row["from_base"] for row in rows] == of_base * (len(rows) // 4)
    logged = [r for r in rows_of(mixed / "metrics.csv") if r.get("rollout/base_share")]
    assert [float(r["rollout/base_share"]) for r in logged] == [0.0, 0.5, 0.5]
    assert [r["selfcheck/base_logp_gap"] != "" for r in logged] == [False, True, True]
    assert all(float(r["selfcheck/base_logp_gap"] or 0) < 1e-4 for r in logged)
    assert all(float(r["selfcheck/engine_logp_gap"]) < 1e-4 for r in logged)


def test_behaviour_log_probs_of_base_samples_are_the_bases_to_the_bit(
    mixed: Path, base: PreTrainedModel
) -> None:
    trajectories = held(mixed)
    of_base = [t for t in trajectories if t["from_base"]]
    assert len(of_base) == len(trajectories) / 2 == 8
    for t in trajectories:
        expected = log_probs(base, t)
        torch.testing.assert_close(t["log_p_base"].double(), expected, atol=1e-4, rtol=0)
        assert torch.equal(t["log_p_old"], t["log_p_base"]) == t["from_base"]
        assert t["policy_version"] == (0 if t["from_base"] else 4)


def test_base_samples_are_drawn_from_the_base_with_seeds_of_their_own(
    mixed: Path, base: PreTrainedModel, request: pytest.FixtureRequest
) -> None:
    if "vllm" in request.node.name:
        pytest.skip("vLLM draws otherwise than transformers")
    tokenizer = load_tokenizer("embedded:tiny", trust_remote_code=False)
    spec = EngineSpec(base, str(folder_of("tiny")), pad_id=int(tokenizer.pad_token_id),
                      eos_ids=(int(tokenizer.eos_token_id),), max_model_len=128, seed=0,
                      trust_remote_code=False)  # fmt: skip
    engine = HfEngine(spec, sequences_per_batch=16, tokens_per_microbatch=4096, logit_chunk_mb=8)
    engine.sync(policy_weights(base), 0)
    trajectories = held(mixed)
    prompts = [t["prompt_ids"] for t in trajectories[::4]]
    seed = random.Random("0-2").randrange(2**31)  # of the run and its third refill
    # samples 2 and 3 of each prompt, after the policy's 0 and 1
    groups = engine.generate(prompts, Sampling(4, 32, seed=seed))
    expected = [list(c.token_ids) for group in groups for c in group]
    same: dict[bool, list[bool]] = {True: [], False: []}  # of the base's, of the policy's
    for t, ids in zip(trajectories, expected, strict=True):
        same[t["from_base"]].append(t["response_ids"] == ids)
    assert all(same[True])
    assert not all(same[False]), "so short a training leaves some as they were"


def test_rollout_metrics_are_of_the_policys_own_samples(mixed: Path) -> None:
    for refill in (2, 3):
        own = [row for row in samples(mixed, refill) if not row["from_base"]]
        everything = samples(mixed, refill)
        (logged,) = [r for r in rows_of(mixed / "metrics.csv")
                     if r["refill"] == str(refill) and r.get("rollout/length_mean")]  # fmt: skip
        for rows, is_logged in ((own, True), (everything, False)):
            length = sum(row["length"] for row in rows) / len(rows)
            log_p = sum(row["log_p_base"] for row in rows) / sum(row["length"] for row in rows)
            found = float(logged["rollout/log_p_base_per_token"])
            assert (found == pytest.approx(log_p, abs=1e-6)) == is_logged
            if is_logged:
                assert float(logged["rollout/length_mean"]) == pytest.approx(length)


@pytest.mark.parametrize("finetune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_it_is_taken_up_where_it_was_left_bit_by_bit(tmp_path: Path, finetune: str) -> None:
    settings = [*SHARE, *STALE, f"finetune={finetune}", "optimizer.lr=3e-3"]
    whole = trained(tmp_path / "whole", *settings, "refills=3")
    trained(tmp_path / "halves", *settings, "refills=2")
    trained(tmp_path / "halves", *settings, "refills=3", f"resume={tmp_path / 'halves'}")
    assert_same_run(whole, tmp_path / "halves")


def test_stale_refills_leave_when_their_share_is_too_small(tmp_path: Path) -> None:
    """The fourth refill's share, worked out from the policy and the buffer after the third."""
    settings = (*STALE, "rollout.base_share=0.5", "optimizer.lr=3e-3")
    before = trained(tmp_path / "three", "refills=3", *settings)
    after = trained(tmp_path / "four", "refills=4", *settings)
    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    state = last_checkpoint(before)
    weights = state["state_dict"].items()
    policy.load_state_dict({n[7:]: w for n, w in weights if n.startswith("policy.")})
    stale = state["RolloutDataModule"]["buffer"]["refills"]
    ratios = {
        refill: [
            float((log_probs(policy, t) - t["log_p_old"].double()).sum().exp())
            for t in ts
            if not t["from_base"]
        ]
        for refill, ts in stale.items()
        if refill >= 3 - 2
    }
    ratios[3] = [1.0] * 8
    kept, gone = sorted(ratios), 0
    while len(kept) > 1 and share([x for refill in kept for x in ratios[refill]]) < 0.6:
        gone += len(stale[kept.pop(0)])
    rows = [r for r in rows_of(after / "metrics.csv") if r.get("rollout/ess")]
    dropped = [float(r["rollout/stale_dropped"]) for r in rows]
    assert dropped[0] == 0, "of the first refill nothing is stale"
    assert dropped[3] == gone
    assert sum(dropped) > 0
    expected = share([x for refill in kept for x in ratios[refill]])
    assert float(rows[3]["rollout/ess"]) == pytest.approx(expected, abs=1e-4)
    assert sorted(last_checkpoint(after)["RolloutDataModule"]["buffer"]["refills"]) == kept


def share(ratios: list[float]) -> float:
    """The effective sample size over the number."""
    return sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios))


@pytest.mark.faults
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_ranks_draw_and_drop_what_one_process_does(tmp_path: Path, trainer: str) -> None:
    settings = ["debug=fast", "rollout=hf", "logger=none", *SHARE, *STALE, "optimizer.lr=3e-3",
                "callbacks.evaluation.max_prompts=2"]  # fmt: skip
    alone = trained(tmp_path / "alone", *SHARE, *STALE, "optimizer.lr=3e-3")
    done = as_torchrun_starts(tmp_path, *settings, "run_dir=both", trainer=trainer)
    assert [ran.returncode for ran in done] == [0, 0], done[0].stdout[-2000:]
    names = ("rollout/base_share", "rollout/stale_dropped", "rollout/ess", "train/kl_base")
    for name in names:
        found, expected = (
            [float(r[name]) for r in rows_of(folder / "metrics.csv") if r.get(name)]
            for folder in (tmp_path / "both", alone)
        )
        assert found == pytest.approx(expected, abs=1e-3)
