"""Updates that are not all the policy's own: samples of the base, and refills that outlived it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from powerflow_lit.clock import PhaseClock
from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import LearnedScalar, Recipe, own_samples, training
from powerflow_lit.log_z import FixedLogZ
from powerflow_lit.models.base import AdapterOffBase, CopiedBase
from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import LoraSettings, add_lora, lora_layers, policy_weights
from powerflow_lit.objectives import BalanceObjective, ImportanceWeight, la_tb_mismatch
from powerflow_lit.objectives.weights import effective_share, outlived
from powerflow_lit.rollout.engine import EngineSpec, NonFiniteRolloutError
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.run_engine import RunEngine
from powerflow_lit.types import Sampling, TrajectoryBatch
from tests.unit.test_module import EQ_10, NO_WEIGHT, batch, module, unkept
from tests.unit.test_rebuilding import one_thread  # noqa: F401 - autouse

# --- the effective sample size and what it drops -------------------------------------------------


def share_of(ratios: Sequence[float]) -> float:
    r = np.array(ratios, dtype=np.float64)
    return float(r.sum() ** 2 / (len(r) * (r**2).sum()))


def test_the_effective_share_is_that_of_the_plain_ratios_also_where_those_would_overflow() -> None:
    log_ratio = torch.tensor([0.3, -1.2, 0.0, 2.0], dtype=torch.float64)
    expected = share_of(np.exp(log_ratio.numpy()).tolist())
    assert float(effective_share(log_ratio)) == pytest.approx(expected, rel=1e-12)
    assert float(effective_share(log_ratio + 2000)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("limit", [0.05, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_the_oldest_refills_go_until_what_is_left_keeps_to_the_limit(limit: float) -> None:
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    by_refill = {7 - age: age * x for age, x in enumerate(noise)}  # the newest is on-policy

    def left_without(count: int) -> list[float]:
        return [math.exp(x) for r in sorted(by_refill)[count:] for x in by_refill[r].tolist()]

    found = outlived(by_refill, limit)
    assert found == sorted(by_refill)[: len(found)]
    assert share_of(left_without(len(found))) >= limit
    assert all(share_of(left_without(count)) < limit for count in range(len(found)))


def test_a_newest_refill_stays_whatever_its_share() -> None:
    lopsided = torch.tensor([0.0, -50.0, -50.0, -50.0])
    assert outlived({3: lopsided}, 0.9) == []
    assert outlived({2: lopsided, 3: lopsided}, 0.9) == [2]


# --- the engine's weights ------------------------------------------------------------------------


class Broken(HfEngine):
    """One of a set number of engines, the first of which samples nothing but NaN as the base."""

    made = 0

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        type(self).made += 1
        self.number, self.held = self.made, [-1]

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        super().sync(weights, policy_version)
        self.held.append(policy_version)

    def generate(self, *args: Any, **settings: Any) -> Any:
        if self.number == 1 and self.policy_version == 0:
            raise NonFiniteRolloutError("log-probs are nan in 1 of 1 responses")
        return super().generate(*args, **settings)


class Standing:
    """A module as far as an engine looks: its policy, its base, and the updates it has made."""

    def __init__(self, *, lora: bool) -> None:
        self.policy = load_model(
            "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
        )
        if lora:
            add_lora(self.policy, LoraSettings(4, 8.0, "all-linear"))
        frozen = AdapterOffBase(self.policy) if lora else CopiedBase(self.policy, torch.float32)
        self.frozen, self.global_step = frozen, 0
        self.start = {n: w.clone() for n, w in policy_weights(self.policy).items()}

    def train(self) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.global_step += 2


def held_by(standing: Standing, reasons: list[str]) -> RunEngine:
    def build(trained: Any) -> HfEngine:
        spec = EngineSpec(trained.policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,),
                          max_model_len=64, seed=0, trust_remote_code=False)  # fmt: skip
        return Broken(spec, sequences_per_batch=64, tokens_per_microbatch=512, logit_chunk_mb=1.0)

    Broken.made = 0
    return RunEngine(
        build, module=lambda: standing, settle=lambda: None, clock=PhaseClock(),  # type: ignore[arg-type, return-value]
        on_rebuild=reasons.append,
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_the_base_keeps_the_weights_that_the_policy_began_with(lora: bool) -> None:
    standing = Standing(lora=lora)
    assert bool(lora_layers(standing.policy)) == lora
    standing.train()
    now, base = policy_weights(standing.policy), standing.frozen.weights()
    assert set(base) == set(now) == set(standing.start)
    assert all(torch.equal(base[name], weight) for name, weight in standing.start.items())
    assert any(not torch.equal(now[name], base[name]) for name in base)


def test_an_engine_samples_from_the_base_and_from_the_policy_again_also_if_it_is_built_anew() -> (
    None
):
    standing, reasons = Standing(lora=False), list[str]()
    held, prompts = held_by(standing, reasons), [[10, 11, 12, 13, 14], [20, 21, 22]]
    sampling = Sampling(4, 12, seed=5)
    held.rebuilds, Broken.made = 0, 1  # the first engine is whole
    held.sync()
    of_base = held.get().generate(prompts, sampling)
    standing.train()
    held.sync()
    of_policy = held.get().generate(prompts, sampling)
    assert of_policy != of_base
    with held.as_base():
        assert held.get().generate(prompts, sampling) == of_base
    held.sync()
    assert held.get().generate(prompts, sampling) == of_policy
    assert held.rebuilds == 0

    other = held_by(standing, reasons)  # whose first engine is poisoned as the base
    other.sync()
    assert other.get().generate(prompts, sampling) == of_policy
    with other.as_base():
        found = other.get().generate(prompts, sampling)
        assert found == of_base, "a new engine has the base's weights too"
    assert (other.rebuilds, len(reasons), Broken.made) == (1, 1, 2)
    other.sync()
    assert other.get().generate(prompts, sampling) == of_policy


# --- what an update logs -------------------------------------------------------------------------


def mixed() -> TrajectoryBatch:
    """The last two rollouts of each prompt are the base's; the policy sampled with other odds."""
    data = batch()  # groups of 4, all with the base's log-probs
    from_base = torch.arange(12) % 4 >= 2
    shift = torch.where(from_base, 0.0, 0.1)[:, None] * data.tokens.mask
    old = data.log_p_old + shift * torch.linspace(-1, 2, 12)[:, None]
    return replace(data, log_p_old=old, from_base=from_base)


@pytest.mark.parametrize("weight", [EQ_10, NO_WEIGHT])
def test_metrics_of_the_policy_are_of_its_own_samples_and_the_loss_is_of_all(
    weight: ImportanceWeight,
) -> None:
    data = mixed()
    assert data.from_base is not None
    trained = module(FixedLogZ(value=-0.7), BalanceObjective(la_tb_mismatch, weight))
    with torch.no_grad():
        trained.policy.lm_head.weight.mul_(1.05)
    loss = trained.training_step(data, 0)
    found = dict(trained.step_metrics)
    everything = trained.training_step(replace(data, from_base=None), 0)
    assert loss is not None
    assert torch.equal(loss, everything)
    assert torch.equal(found["residual_std"], trained.step_metrics["residual_std"])
    assert not torch.equal(found["kl_base"], trained.step_metrics["kl_base"])

    with torch.no_grad():
        log_pf = trained.policy_scores(data).log_prob.double()
    own, mask = ~data.from_base, data.tokens.mask
    S, B, old = ((x.double() * mask).sum(1)[own] for x in (log_pf, data.log_p_base, data.log_p_old))
    tokens = mask.sum(1)[own].sum()
    assert float(found["entropy"]) == pytest.approx(float(-S.sum() / tokens), abs=1e-6)
    assert float(found["kl_base"]) == pytest.approx(float((S - B).sum() / tokens), abs=1e-6)
    ratio = (S - old).exp().tolist()
    assert float(found["ess"]) == pytest.approx(share_of(ratio), abs=1e-5)
    clipped = ratio if not weight.is_used else [min(max(r, 0.8), 1.2) for r in ratio]
    mean = 1.0 if not weight.is_used else sum(clipped) / len(clipped)
    assert float(found["is_weight_mean"]) == pytest.approx(mean, abs=1e-5)
    of_base = ((log_pf - data.log_p_base.double()) * mask).sum(1)[~own].exp().clamp(0.8, 1.2)
    expected = float(of_base.mean()) if weight.is_used else 1.0
    assert float(found["is_weight_base"]) == pytest.approx(expected, abs=1e-5)


def test_the_bases_samples_are_no_stale_ones_of_which_nobody_kept_the_log_probs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They come from version 0, with log-probs; the policy's own come without, and need none."""
    data, version = mixed(), 3
    assert data.from_base is not None
    own = ~data.from_base
    log_p_old = torch.where(own[:, None], unkept(data).log_p_old, data.log_p_old)
    versions = torch.where(own, version, 0)
    data = replace(data, log_p_old=log_p_old, policy_version=versions)
    trained = module(FixedLogZ(value=-0.7), BalanceObjective(la_tb_mismatch, NO_WEIGHT))
    monkeypatch.setattr(type(trained), "global_step", version)
    trained.training_step(data, 0)
    assert trained.step_metrics["ess"] == 1
    trained.training_step(replace(data, policy_version=versions.clamp(max=2)), 1)
    assert "ess" not in trained.step_metrics


# --- the exact case ------------------------------------------------------------------------------


def test_a_quarter_of_base_samples_mends_a_collapse_and_truncated_weights_undo_that() -> None:
    """`experiments/off_policy`: a high rate of the policy, a low one of log Z', alpha = 4."""
    language = Language.build()
    base = language.bigram_base(1)
    target, _ = language.length_averaged_target(base, 4.0)
    recipe = Recipe(1000, 0.5, 0.01, samples=256, updates_per_refill=2)

    def end(weight: ImportanceWeight, base_share: float) -> float:
        objective = partial(BalanceObjective(la_tb_mismatch, weight), alpha=4.0)
        batch = own_samples(language, base, recipe, group=8, base_share=base_share)
        *_, last = training(base, objective, LearnedScalar(), recipe, batch)
        return total_variation(language.log_probs(last.logits), target)

    assert end(EQ_10, 0.0) > 0.2
    assert end(EQ_10, 0.25) < 0.06
    assert end(ImportanceWeight("seq_sum", None, 0.2), 0.25) > 0.12


def test_strings_of_the_base_come_with_its_log_probs_or_with_those_of_the_mixture() -> None:
    language = Language.build()
    base = language.bigram_base(1)
    policy = 2.0 * base
    recipe = Recipe(10, 0.1, 0.1, samples=4000)
    found = own_samples(language, base, recipe, group=8, base_share=0.25)(policy, 0)
    of_base = torch.arange(4000) % 8 >= 6
    p, q = language.log_probs(policy).exp(), language.log_probs(base).exp()
    old = found.log_p_old.sum(1)
    assert torch.equal(found.log_p_old[of_base], found.log_p_base[of_base])
    assert torch.equal(found.log_p_old[~of_base], found.log_pf[~of_base])
    # the mean log-prob under the base tells who drew: within five standard errors of either
    for rows, chances in ((of_base, q), (~of_base, p)):
        log_p = found.log_p_base.sum(1)[rows]
        expected = float((chances * q.log()).sum())
        assert abs(float(log_p.mean()) - expected) < 5 * float(log_p.std()) / len(log_p) ** 0.5
    mixed = own_samples(language, base, recipe, group=8, base_share=0.25, as_mixture=True)
    again = mixed(policy, 0)
    assert torch.equal(again.log_pf, found.log_pf), "the same strings"
    chance = 0.75 * found.log_pf.sum(1).exp() + 0.25 * found.log_p_base.sum(1).exp()
    torch.testing.assert_close(again.log_p_old.sum(1).exp(), chance)
    assert not torch.allclose(old.exp(), chance)
