"""alpha by a target: where it ends, what it counts, and what it is refused for.

The enumerable language gives the references: the alpha at which the exact target has the wanted
entropy or KL, found by bisection on enumerated distributions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from powerflow_lit.automatic_alpha import AutomaticAlpha, EntropyRatio, KlBudget
from powerflow_lit.config.rules import ConfigError
from powerflow_lit.enumerable import Language, root
from powerflow_lit.enumerable_training import ClosedForm, Recipe, inputs_for, own_samples, training
from powerflow_lit.fresh import FreshRollouts, Sums
from powerflow_lit.log_z import GroupLogZ
from powerflow_lit.objectives import (
    BalanceObjective,
    ImportanceWeight,
    LossInputs,
    ObjectiveError,
    la_tb,
    la_tb_mismatch,
    rl_traj,
    tb_token,
    tb_traj,
    token_variance,
)
from powerflow_lit.preflight import light_parts
from powerflow_lit.types import TokenBatch, TrajectoryBatch
from tests.unit.test_config import checked
from tests.unit.test_module import EQ_10, NO_WEIGHT, batch, module, step

LANGUAGE = Language.build()
BASE = LANGUAGE.bigram_base(seed=4)


def automatic(target: Any, **changes: Any) -> AutomaticAlpha:
    settings: dict[str, Any] = {
        "start": 2.0, "rate": 0.1, "gain": 0.1, "smoothing": 0.0, "largest_gap": 1.0,
        "alpha_min": 0.1, "alpha_max": 10.0, "scope": "global", "patience": 5,
    }  # fmt: skip
    return AutomaticAlpha(target=target, **{**settings, **changes})


# --- references ----------------------------------------------------------------------------------


def entropy_per_token(log_p: Tensor) -> float:
    """sum_y p(y) (-log p(y)) / sum_y p(y) |y|, nats."""
    p = log_p.exp()
    return float(-(p * log_p).sum() / (p * LANGUAGE.lengths).sum())


def kl_to_base(log_p: Tensor, per: str) -> float:
    p = log_p.exp()
    kl = float((p * (log_p - LANGUAGE.log_probs(BASE))).sum())
    return kl / float((p * LANGUAGE.lengths).sum()) if per == "token" else kl


def target_at(alpha: float) -> Tensor:
    """log p of every string under the exact length-averaged target."""
    return LANGUAGE.length_averaged_target(BASE, alpha)[0]


def alpha_of_entropy(ratio: float) -> float:
    wanted = ratio * entropy_per_token(LANGUAGE.log_probs(BASE))
    return math.exp(root(lambda x: entropy_per_token(target_at(math.exp(x))) - wanted, 2.0))


def alpha_of_kl(budget: float, per: str, side: int) -> float:
    def over(x: float) -> float:
        return budget - kl_to_base(target_at(math.exp(side * (1 + x))), per)

    return math.exp(side * (1 + root(over, 1.0)))


def exactly(log_p: Tensor) -> FreshRollouts:
    """Endless rollouts of a policy: expectations for sums."""
    p, rollouts = log_p.exp(), FreshRollouts()
    lengths: Any = float((p * LANGUAGE.lengths).sum())
    surprise = float(-(p * log_p).sum())
    rollouts.of_prompt[0] = Sums(1, lengths, surprise, kl_to_base(log_p, "response"))
    return rollouts


# --- where it ends -------------------------------------------------------------------------------


def settled(schedule: AutomaticAlpha, refills: int) -> float:
    """alpha after refills whose policy is the exact target of the alpha before, from the base."""
    schedule.step(exactly(LANGUAGE.log_probs(BASE)))
    for _ in range(refills):
        schedule.step(exactly(target_at(schedule(0.0, 0.0))))
    return schedule(0.0, 0.0)


@pytest.mark.parametrize(("ratio", "start"), [(0.7, 2.0), (0.9, 2.0), (1.15, 0.8), (0.8, 0.5)])
def test_an_entropy_ratio_ends_at_the_alpha_whose_target_has_it(ratio: float, start: float) -> None:
    """Also from the wrong side of 1."""
    schedule = automatic(EntropyRatio(ratio=ratio), start=start, rate=1.0)
    assert settled(schedule, 100) == pytest.approx(alpha_of_entropy(ratio), rel=1e-4)
    assert schedule.gap == pytest.approx(0.0, abs=1e-5)
    assert schedule.out_of_reach is None


@pytest.mark.parametrize(("per", "budget"), [("token", 0.05), ("response", 0.12)])
@pytest.mark.parametrize("side", [1, -1])
def test_a_kl_budget_ends_at_the_alpha_on_its_side_whose_target_spends_it(
    side: int, per: Any, budget: float
) -> None:
    schedule = automatic(KlBudget(budget=budget, per=per), start=1.2**side, rate=0.2)
    assert settled(schedule, 100) == pytest.approx(alpha_of_kl(budget, per, side), rel=1e-4)


@pytest.mark.slow
def test_a_trained_policy_that_lags_behind_ends_on_its_target_too() -> None:
    """Adam on own samples, ten updates a refill: value and alpha are those of enumeration."""
    schedule = automatic(EntropyRatio(ratio=0.7), rate=0.5, gain=2.0, smoothing=0.5)
    recipe = Recipe(steps=1000, lr=0.05, lr_z=0.0, samples=256, updates_per_refill=10)

    def objective(inputs: LossInputs) -> Any:
        return la_tb(inputs, alpha=schedule(0.0, 0.0))

    def mismatch(inputs: LossInputs) -> Tensor:
        return la_tb_mismatch(inputs, alpha=schedule(0.0, 0.0))

    reached = []
    samples = own_samples(LANGUAGE, BASE, recipe)
    for at in training(BASE, objective, ClosedForm(mismatch), recipe, samples):
        if at.number % recipe.updates_per_refill == 0:
            log_p = LANGUAGE.log_probs(at.logits)
            reached.append(entropy_per_token(log_p))
            schedule.step(exactly(log_p))
    wanted = 0.7 * entropy_per_token(LANGUAGE.log_probs(BASE))
    assert sum(reached[-10:]) / 10 == pytest.approx(wanted, rel=0.01)
    assert schedule(0.0, 0.0) == pytest.approx(alpha_of_entropy(0.7), rel=0.05)


def test_a_kl_budget_never_crosses_to_the_other_side_of_the_base() -> None:
    for start, side in ((1.5, 1), (0.7, -1)):
        schedule = automatic(KlBudget(budget=0.001, per="token"), start=start, rate=1.0)
        far = exactly(target_at(4.0))  # spends far more, whatever alpha is
        alphas = []
        for _ in range(20):
            schedule.step(far)
            alphas.append(schedule(0.0, 0.0))
        assert all(side * (alpha - 1) >= 0 for alpha in alphas)
        assert alphas[-1] == 1.0


def test_a_target_beyond_the_bounds_is_told_once_alpha_has_stood_there_for_long() -> None:
    schedule = automatic(EntropyRatio(ratio=0.05), alpha_max=3.0, patience=5)
    base, least = LANGUAGE.log_probs(BASE), target_at(3.0)
    schedule.step(exactly(base))
    for _ in range(4):
        schedule.step(exactly(least))
    assert schedule.out_of_reach is None
    for _ in range(10):
        schedule.step(exactly(least))
    told = schedule.out_of_reach
    assert told is not None
    assert "alpha_schedule.target.ratio=0.05" in told
    assert "its bound 3" in told
    assert "alpha_schedule.alpha_max" in told


# --- what is counted -----------------------------------------------------------------------------


def test_sums_of_rollouts_estimate_entropy_and_kl() -> None:
    policy = LANGUAGE.logits_of(target_at(2.0))
    chances = LANGUAGE.log_probs(policy).exp()
    rows = torch.multinomial(chances, 4_000, True, generator=torch.Generator().manual_seed(0))
    own = LANGUAGE.token_log_probs(policy)[rows]
    inputs = inputs_for(LANGUAGE, policy, BASE, rows=rows, log_p_old=own)
    rollouts = FreshRollouts()
    ones = torch.ones(4_000, dtype=torch.long)
    rows_of_it = TokenBatch(ones[:, None], ones, inputs.mask.sum(1))
    rollouts.add(
        inputs,
        TrajectoryBatch(
            tokens=rows_of_it, log_p_base=inputs.log_p_base, log_p_old=own, formatted=ones > 0,
            prompt_index=ones, prompt_id=ones, policy_version=ones,
        ),
    )  # fmt: skip
    log_p = target_at(2.0)
    assert EntropyRatio(ratio=1.0).measure(rollouts.whole) == pytest.approx(
        entropy_per_token(log_p), rel=0.04
    )
    for per in ("token", "response"):
        budget = KlBudget(budget=1.0, per=per)  # type: ignore[arg-type]
        assert budget.measure(rollouts.whole) == pytest.approx(kl_to_base(log_p, per), rel=0.06)


def test_only_fresh_rollouts_count_and_padding_never_does() -> None:
    data = batch()
    stale = data.policy_version.clone()
    stale[:4] = 7
    steered = module(GroupLogZ(), alpha_schedule=automatic(EntropyRatio(ratio=0.5)))
    steered.fresh.version = 7
    step(steered, replace(data, policy_version=stale))
    lengths = data.tokens.response_lengths[:4]
    expected = -sum(row[:n].double().sum() for row, n in zip(data.log_p_old, lengths, strict=False))
    assert set(steered.fresh.of_prompt) == {100}
    assert steered.fresh.whole.tokens == int(lengths.sum())
    assert steered.fresh.whole.responses == 4
    assert steered.fresh.whole.surprise == pytest.approx(float(expected))


def test_a_skipped_update_teaches_nothing_and_a_refill_without_fresh_rollouts_neither() -> None:
    steered = module(GroupLogZ(), alpha_schedule=automatic(EntropyRatio(ratio=0.5)))
    data = batch()
    broken = data.log_p_base.clone()
    broken[0, 0] = math.nan
    steered.print = lambda *_: None  # type: ignore[method-assign, assignment]
    assert steered.training_step(replace(data, log_p_base=broken), 0) is None
    assert steered.fresh.whole == Sums()
    steered.end_refill()
    assert steered.alpha == pytest.approx(2.0)
    assert steered.automatic is not None
    assert steered.automatic.reached is None


def test_the_end_of_a_refill_moves_alpha_unless_a_monitor_pulls_it() -> None:
    steered = module(GroupLogZ(), alpha_schedule=automatic(EntropyRatio(ratio=0.5)))
    step(steered, batch())
    steered.alpha_pull = 0.5
    steered.end_refill()
    assert steered.alpha == pytest.approx(1 + 0.5 * (2.0 - 1)), "it would wind up meanwhile"
    assert steered.fresh.whole == Sums()
    steered.alpha_pull = 1.0
    step(steered, batch())
    steered.end_refill()
    # at the base the entropy is twice the target: a gap of -1, of which rate and gain take theirs
    assert steered.alpha == pytest.approx(2.0 * math.exp(0.1 + 0.1))


def test_a_refill_broken_off_and_taken_up_again_goes_on_bit_by_bit() -> None:
    target = KlBudget(budget=0.3, per="token")
    whole, half, resumed = (
        module(GroupLogZ(), alpha_schedule=automatic(target, scope="prompt")) for _ in range(3)
    )
    for steered in (whole, half):
        step(steered, batch())
        steered.end_refill()
        step(steered, batch(groups=4))
    kept: dict[str, Any] = {}
    half.on_save_checkpoint(kept)
    plain = {k: v for k, v in kept["powerflow"].items() if k != "random_states"}
    assert json.loads(json.dumps(plain)).keys() == plain.keys(), "numbers and lists only"
    resumed.on_load_checkpoint(kept)
    for steered in (whole, resumed):
        step(steered, batch(groups=2))
        steered.end_refill()
    ids = torch.tensor([100, 101, 102, 103, 999])
    assert torch.equal(whole.alpha_of(ids), resumed.alpha_of(ids))  # type: ignore[arg-type]
    assert whole.alpha == resumed.alpha


# --- an alpha for each prompt --------------------------------------------------------------------


def test_each_prompt_ends_at_its_own_alpha_and_a_new_one_begins_with_that_of_all() -> None:
    schedule = automatic(EntropyRatio(ratio=0.8), scope="prompt", rate=1.0)
    base = exactly(LANGUAGE.log_probs(BASE)).whole
    schedule.step(FreshRollouts())
    rollouts = FreshRollouts()
    rollouts.of_prompt = {1: base, 2: base}
    schedule.step(rollouts)
    for _ in range(100):  # prompt 2 is a quarter surer of itself than prompt 1 at any alpha
        alphas = schedule.of_prompts(torch.tensor([1, 2]))
        assert alphas is not None
        one, other = (exactly(target_at(a)).whole for a in alphas.tolist())
        rollouts.of_prompt = {1: one, 2: replace(other, surprise=0.75 * other.surprise)}
        schedule.step(rollouts)
    found = schedule.of_prompts(torch.tensor([1, 2, 3]))
    assert found is not None
    assert found[0].item() == pytest.approx(alpha_of_entropy(0.8), rel=1e-3)
    assert found[1].item() == pytest.approx(alpha_of_entropy(0.8 / 0.75), rel=1e-3)
    assert found[2].item() == pytest.approx(math.exp(schedule.dual.value))
    assert schedule(0.0, 0.0) == pytest.approx(float(found[:2].log().mean().exp()))  # median of two
    spread = schedule.metrics
    assert spread["alpha_prompt_q05"] < spread["alpha_prompt_mean"] < spread["alpha_prompt_q95"]


@pytest.mark.parametrize(
    "objective",
    [
        la_tb,
        tb_traj,
        partial(tb_token, scale=7.0, reading="energy"),
        partial(tb_token, scale=7.0, reading="power"),
        partial(tb_token, scale=7.0, reading="per_token"),
        BalanceObjective(la_tb_mismatch, EQ_10, token_variance),
    ],
)
def test_an_alpha_a_trajectory_is_each_trajectory_under_its_own(
    objective: Callable[..., Any],
) -> None:
    policy = LANGUAGE.logits_of(target_at(1.5))
    rows = torch.arange(40, 60)
    own = LANGUAGE.token_log_probs(policy)[rows] - 0.1
    inputs = inputs_for(LANGUAGE, policy, BASE, rows=rows, log_p_old=own, psi=-0.2)
    alphas = torch.linspace(0.3, 5.0, len(rows), dtype=torch.float64)
    one_by_one = [
        objective(
            inputs_for(
                LANGUAGE, policy, BASE, rows=rows[i : i + 1], log_p_old=own[i : i + 1], psi=-0.2
            ),
            alpha=float(alphas[i]),
        )
        for i in range(len(rows))
    ]
    together = objective(inputs, alpha=alphas)
    expected = sum(float(out.loss) for out in one_by_one) / len(rows)
    assert float(together.loss) == pytest.approx(expected, rel=1e-12)
    residuals = torch.cat([out.residual for out in one_by_one])
    torch.testing.assert_close(together.residual, residuals, atol=1e-12, rtol=1e-12)


def test_the_module_trains_each_prompt_under_its_own_alpha() -> None:
    data = batch()
    schedule = automatic(EntropyRatio(ratio=0.9), scope="prompt")
    steered = module(GroupLogZ(), BalanceObjective(la_tb_mismatch, NO_WEIGHT),
                     alpha_schedule=schedule)  # fmt: skip
    step(steered, data)
    steered.end_refill()
    own = steered.alpha_of(data.prompt_id)
    assert isinstance(own, Tensor)
    assert len(own.unique()) == 3
    loss = float(step(steered, data))
    apart = []
    for prompt in data.prompt_id.unique():
        rows = data.prompt_id == prompt
        plain = module(GroupLogZ(), BalanceObjective(la_tb_mismatch, NO_WEIGHT),
                       alpha=float(own[rows][0]))  # fmt: skip
        plain.load_state_dict(steered.state_dict())
        part = replace(
            data,
            tokens=data.tokens.rows(rows.nonzero().flatten()),
            **{n: getattr(data, n)[rows] for n in ("formatted", "prompt_index", "prompt_id",
                                                   "policy_version")},
            **{n: getattr(data, n)[rows][:, : int(data.tokens.response_lengths[rows].max())]
               for n in ("log_p_base", "log_p_old")},
        )  # fmt: skip
        apart.append(float(step(plain, part)))
    assert loss == pytest.approx(sum(apart) / 3, rel=1e-5)


def test_a_bad_alpha_among_many_is_named_and_rl_takes_one_for_all() -> None:
    inputs = inputs_for(LANGUAGE, BASE, BASE)
    alphas = torch.full((len(LANGUAGE),), 2.0, dtype=torch.float64)
    alphas[5] = -0.5
    with pytest.raises(ObjectiveError, match=r"alpha=-0\.5: the power of p_base needs alpha > 0"):
        la_tb(inputs, alpha=alphas)
    weight = ImportanceWeight("none", None, None)
    with pytest.raises(ObjectiveError, match="rl_traj takes one alpha for all prompts"):
        rl_traj(inputs, alpha=alphas.abs() + 1, kl="in_reward", advantage="rloo",
                reduction="sequence_sum", weight=weight)  # fmt: skip


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["target_entropy", "target_kl"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("alpha_schedule.rate=0",), "rate=0: must be positive"),
        (("alpha_schedule.gain=-1",), "gain=-1: must be 0 or more"),
        (("alpha_schedule.smoothing=1",), r"smoothing=1: must lie in \[0, 1\)"),
        (("alpha_schedule.patience=1.5",), "patience=1.5: must be a whole number"),
        (("alpha_schedule.scope=prompts",), "did you mean prompt"),
        (("alpha_schedule.alpha_min=3", "alpha_schedule.alpha_max=3"), "leave alpha no room"),
        (("alpha=12",), r"start=12.*alpha_max=10\.0; alpha= sets it"),
        (("~alpha_schedule.gain",), "gain is missing: set alpha_schedule.gain="),
        (("+alpha_schedule.gian=2",), r"did you mean alpha_schedule\.gain\?"),
        (("strategy=grpo",), "does not use alpha"),
        (("strategy=rl_traj",), "alpha_min=0.1 with strategy=rl_traj.*above 1"),
        (("strategy=rl_token", "alpha_schedule.alpha_min=1.1", "alpha_schedule.scope=prompt"),
         "scope=prompt with strategy=rl_token"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_line(
    schedule: str, changes: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(f"alpha_schedule={schedule}", *changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("alpha_schedule=target_entropy", "alpha_schedule.target.ratio=1"), "below 1 to sharpen"),
        (("alpha_schedule=target_entropy", "alpha_schedule.target.ratio=-1"), "ratio=-1: must be"),
        (("alpha_schedule=target_kl", "alpha_schedule.target.budget=0"), "budget=0: must be posit"),
        (("alpha_schedule=target_kl", "alpha_schedule.target.per=word"), "token, response"),
        (("alpha_schedule=target_kl", "alpha=1"), "which side|says which way"),
    ],
)
def test_a_target_that_no_policy_has_is_refused(changes: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(*changes)


def test_a_strategy_that_cannot_take_an_alpha_for_each_prompt_is_refused_before_a_model_loads(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def mismatch(inputs, *, alpha):\n    return inputs.log_z * math.log(alpha)\n"
    (tmp_path / "one_alpha.py").write_text(f"import math\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    mismatch = "strategy.objective.mismatch._target_=one_alpha.mismatch"
    mine = ("alpha_schedule=target_entropy", mismatch)
    light_parts(checked(*mine))
    with pytest.raises(ConfigError, match=r"alpha_schedule\.scope=prompt"):
        light_parts(checked(*mine, "alpha_schedule.scope=prompt"))
