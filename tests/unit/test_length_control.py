"""A chosen mean length: the exact price of a token, and its search beside training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import inputs_for
from powerflow_lit.length_control import ChosenLength, LengthControlError
from powerflow_lit.objectives import (
    BalanceObjective,
    ImportanceWeight,
    LossInputs,
    NonFiniteInputError,
    ObjectiveError,
    PerToken,
    flowrl_mismatch,
    format_only_mismatch,
    group_log_z,
    la_tb,
    length_fit,
    powerflow,
    solve_length_price,
    tb_token,
    tb_traj_mismatch,
    tilted_length,
)
from powerflow_lit.resume import CheckpointError, ResumePoint, refuse_another

LANGUAGE = Language.build()
LENGTH = LANGUAGE.lengths
BASE = LANGUAGE.bigram_base(seed=3)
PSI = torch.where(LANGUAGE.lacks(letter=0), -0.5, 0.0).double()
NO_PSI = torch.zeros(len(LANGUAGE), dtype=torch.float64)
ON_POLICY = ImportanceWeight("none", None, None)
EXACT = ImportanceWeight("seq_sum", None, None)  # N pi(y): a mean over all strings is E_pi
CONTROL: dict[str, Any] = {
    "tokens": None, "factor": 1.0, "scope": "global", "follow": 0.5, "rate": 1.0, "max_step": 0.2,
    "bounds": [-10.0, 10.0], "max_tokens": 7,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def control(**changes: Any) -> ChosenLength:
    return ChosenLength(**{**CONTROL, **changes})


def mean_length(log_p: Tensor) -> float:
    return float((log_p.exp() * LENGTH).sum())


BASE_LENGTH = mean_length(LANGUAGE.log_probs(BASE))


# --- the exact price -----------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.35])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_the_solved_price_reaches_the_length_and_is_that_of_enumeration(
    alpha: float, factor: float, psi: Tensor
) -> None:
    chosen = factor * BASE_LENGTH
    energy = alpha * (LANGUAGE.log_probs(BASE) + LENGTH * psi)
    price = solve_length_price(energy, LENGTH, target=chosen)
    exact, root = LANGUAGE.chosen_length_target(BASE, alpha, chosen, psi)
    tilted = (energy - price * LENGTH).log_softmax(0)
    assert mean_length(tilted) == pytest.approx(chosen, abs=1e-9)
    assert price == pytest.approx(root, abs=1e-9)
    assert total_variation(tilted, exact) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_any_length_between_the_shortest_and_the_longest_has_its_price(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 3000, (400,), generator=generator)
    weight = 500 * torch.randn(400, generator=generator)  # as log-probs of long responses spread
    weight[torch.rand(400, generator=generator) < 0.3] = -math.inf  # never sampled
    present = length[weight > -math.inf].double()
    for share in (0.001, 0.2, 0.5, 0.9, 0.999):
        chosen = float(present.min() + share * (present.max() - present.min()))
        price = solve_length_price(weight, length, target=chosen)
        kept = weight > -math.inf
        logits = weight[kept].double() - price * present
        assert float((logits.softmax(0) * present).sum()) == pytest.approx(chosen, rel=1e-6)
        assert tilted_length(weight, length, price)[0] == pytest.approx(chosen, rel=1e-6)


@pytest.mark.parametrize("chosen", [0.5, 1.0, 6.0, 9.0])
def test_a_length_that_no_price_yields_is_refused(chosen: float) -> None:
    with pytest.raises(ObjectiveError, match=rf"{chosen:g} tokens cannot be had.*1 to 6"):
        solve_length_price(LANGUAGE.log_probs(BASE), LENGTH, target=chosen)


def test_a_dearer_token_shortens_by_the_variance_of_the_length() -> None:
    energy = LANGUAGE.log_probs(BASE)
    for price in (-0.7, 0.0, 0.4):
        _, variance = tilted_length(energy, LENGTH, price)
        up, down = (tilted_length(energy, LENGTH, price + h)[0] for h in (1e-5, -1e-5))
        assert (up - down) / 2e-5 == pytest.approx(-variance, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_powerflow_is_the_length_at_which_log_z_is_zero(alpha: float) -> None:
    averaged, log_z = LANGUAGE.length_averaged_target(BASE, alpha)
    energy = alpha * LANGUAGE.log_probs(BASE)
    price = solve_length_price(energy, LENGTH, target=mean_length(averaged))
    assert price == pytest.approx(log_z, abs=1e-9)
    assert float((energy - price * LENGTH).logsumexp(0)) == pytest.approx(0.0, abs=1e-9)


# --- the least change (Prop. 3.2) ----------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.7, 1.3])
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_the_tilt_is_what_a_constrained_optimiser_finds(alpha: float, factor: float) -> None:
    """Newton's method on the Lagrange conditions of min KL(p || p~), which knows of no tilt."""
    energy, chosen = alpha * LANGUAGE.log_probs(BASE), factor * BASE_LENGTH
    rows = torch.stack([torch.ones_like(LENGTH), LENGTH])  # sum to one, mean length
    wanted = torch.tensor([1.0, chosen], dtype=torch.float64)
    p, dual = torch.full_like(LENGTH, 1 / len(LENGTH)), torch.zeros(2, dtype=torch.float64)
    for _ in range(200):
        gradient = p.log() + 1 - energy + rows.T @ dual
        matrix = torch.zeros(len(p) + 2, len(p) + 2, dtype=torch.float64)
        matrix[: len(p), : len(p)] = (1 / p).diag()
        matrix[: len(p), len(p) :], matrix[len(p) :, : len(p)] = rows.T, rows
        step = torch.linalg.solve(matrix, -torch.cat([gradient, rows @ p - wanted]))
        falls = step[: len(p)] < 0
        room = float((-p[falls] / step[: len(p)][falls]).min()) if bool(falls.any()) else 1.0
        share = min(1.0, 0.5 * room)
        p, dual = p + share * step[: len(p)], dual + share * step[len(p) :]
        if float(gradient.abs().max()) < 1e-12:
            break
    exact, price = LANGUAGE.chosen_length_target(BASE, alpha, chosen)
    assert total_variation(p.log(), exact) < 1e-9
    assert float(dual[1]) == pytest.approx(price, abs=1e-8)


def test_every_other_distribution_of_that_length_is_farther_from_the_target() -> None:
    energy, chosen = 4.0 * LANGUAGE.log_probs(BASE), 1.2 * BASE_LENGTH
    best = LANGUAGE.chosen_length_target(BASE, 4.0, chosen)[0].exp()

    def divergence(p: Tensor) -> float:
        return float((p * (p.log() - energy)).sum())

    kept, _ = torch.linalg.qr(torch.stack([torch.ones_like(LENGTH), LENGTH], dim=1))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 0.9):
        for _ in range(20):
            noise = best * torch.randn(len(best), generator=generator, dtype=torch.float64)
            noise = noise - kept @ (kept.T @ noise)  # sum and mean length stay
            other = best + size * noise * float((best / noise.abs()).min())
            assert float(other.sum()) == pytest.approx(1.0, abs=1e-12)
            assert float((other * LENGTH).sum()) == pytest.approx(chosen, abs=1e-11)
            assert divergence(other) > divergence(best)


# --- the residual --------------------------------------------------------------------------------


def priced(inputs: LossInputs, price: float) -> LossInputs:
    return replace(inputs, length_price=torch.full_like(inputs.log_z, price))


@pytest.mark.parametrize("weight", [ON_POLICY, PerToken(ON_POLICY)], ids=["sum", "per_token"])
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_the_loss_vanishes_at_the_tilted_target_and_at_its_price_alone(
    alpha: float, weight: Any
) -> None:
    log_p, price = LANGUAGE.chosen_length_target(BASE, alpha, 0.8 * BASE_LENGTH, PSI)
    log_z = float((alpha * (LANGUAGE.log_probs(BASE) + LENGTH * PSI) - price * LENGTH).logsumexp(0))
    there = inputs_for(LANGUAGE, LANGUAGE.logits_of(log_p), BASE, log_z=log_z, psi=PSI)
    loss = partial(BalanceObjective(tb_traj_mismatch, weight), alpha=alpha)
    assert float(loss(priced(there, price)).loss) < 1e-20
    assert float(loss(priced(there, price + 0.1)).loss) > 1e-3
    assert float(loss(there).loss) > 1e-3


@pytest.mark.parametrize("log_z", [-3.0, 5.0])
def test_its_on_policy_gradient_is_that_of_twice_the_kl_to_the_tilted_target(log_z: float) -> None:
    target, price = LANGUAGE.chosen_length_target(BASE, 2.0, 1.2 * BASE_LENGTH)
    logits = BASE.clone().requires_grad_()
    inputs = priced(inputs_for(LANGUAGE, logits, BASE, log_z=log_z), price)
    loss = BalanceObjective(tb_traj_mismatch, EXACT)(inputs, alpha=2.0).loss
    (actual,) = torch.autograd.grad(loss, logits)
    log_p = LANGUAGE.log_probs(logits)
    (expected,) = torch.autograd.grad(2.0 * (log_p.exp() * (log_p - target)).sum(), logits)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_per_token_squares_the_residual_divided_by_the_length() -> None:
    inputs = priced(inputs_for(LANGUAGE, BASE, BASE, log_z=-1.5, psi=PSI), 0.3)
    S = (inputs.log_pf * inputs.mask).sum(1)
    d = -1.5 + S - 2.0 * (S + LENGTH * PSI) + 0.3 * LENGTH
    weight = ImportanceWeight("seq_sum", 0.2, 0.2)
    output = BalanceObjective(tb_traj_mismatch, PerToken(weight))(inputs, alpha=2.0)
    expected = (weight(inputs).value * (d / LENGTH) ** 2).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.residual, d)
    assert PerToken(weight).is_used
    assert not PerToken(ON_POLICY).is_used


@pytest.mark.parametrize(
    "objective",
    [
        la_tb,
        partial(powerflow, epsilon=0.2),
        partial(tb_token, scale=2.0, reading="energy"),
        partial(tb_token, scale=2.0, reading="per_token"),
        partial(flowrl_mismatch, scale=15.0),
        format_only_mismatch,
    ],
)
def test_objectives_that_fix_the_length_refuse_a_price(objective: Callable[..., Any]) -> None:
    inputs = inputs_for(LANGUAGE, BASE, BASE)
    with pytest.raises(ObjectiveError, match="take strategy=powerflow_length or tb_traj"):
        objective(priced(inputs, 0.0), alpha=2.0)


def test_a_price_that_is_no_number_is_named() -> None:
    inputs = priced(inputs_for(LANGUAGE, BASE, BASE), math.nan)
    with pytest.raises(NonFiniteInputError, match="length_price holds a NaN"):
        BalanceObjective(tb_traj_mismatch, ON_POLICY)(inputs, alpha=2.0)


# --- what rollouts say ---------------------------------------------------------------------------


@pytest.mark.parametrize("price", [-2.0, 0.5])
def test_a_fit_finds_the_price_that_the_policy_has_answered(price: float) -> None:
    log_p, answered = LANGUAGE.chosen_length_target(BASE, 4.0, 0.9 * BASE_LENGTH)
    rows = torch.multinomial(log_p.exp(), 60, True, generator=torch.Generator().manual_seed(0))
    logits = LANGUAGE.logits_of(log_p)
    inputs = priced(inputs_for(LANGUAGE, logits, BASE, rows=rows, group=6), price)
    of_prompt = 30.0 * torch.arange(10).repeat_interleave(6)  # prompts have a log Z each
    mismatch = tb_traj_mismatch(inputs, alpha=4.0) + of_prompt
    for weight in (torch.ones(60), 1 / LENGTH[rows] ** 2):
        fit = length_fit(mismatch, weight, LENGTH[rows], inputs.prompt_index)
        assert fit.lead == pytest.approx(price - answered, abs=1e-9)
    within = [LENGTH[rows][inputs.prompt_index == i].var() for i in range(10)]
    assert fit.variance == pytest.approx(float(torch.stack(within).mean()), abs=1e-12)


def test_rollouts_of_one_length_say_nothing() -> None:
    length, index = torch.full((6,), 3), torch.tensor([0, 0, 0, 1, 1, 1])
    fit = length_fit(torch.randn(6), torch.ones(6), length, index)
    assert (fit.lead, fit.variance) == (0.0, 0.0)


# --- search beside training ----------------------------------------------------------------------


def trained(
    chosen: ChosenLength, weight: Any, alpha: float, bases: list[Tensor], updates: int = 400
) -> tuple[list[list[float]], list[Tensor], Tensor]:
    """Tables trained on their own samples, a refill an update, one table a prompt.

    Returns the mean length of each after each update, their log-probs, and the mean of the last 50
    prices, which the samples move about.
    """
    tables = [base.clone().requires_grad_() for base in bases]
    optimizer = torch.optim.Adam(tables, lr=0.03)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 - k / updates)
    generator = torch.Generator().manual_seed(0)
    objective, size = BalanceObjective(tb_traj_mismatch, weight), 128 // len(bases)
    index = torch.arange(len(bases)).repeat_interleave(size)
    seen, prices = [], []
    for _ in range(updates):
        parts, rows = [], []
        for table, base in zip(tables, bases, strict=True):
            chance = LANGUAGE.log_probs(table.detach()).exp()
            rows.append(torch.multinomial(chance, size, True, generator=generator))
            old = LANGUAGE.token_log_probs(table.detach())[rows[-1]]
            parts.append(inputs_for(LANGUAGE, table, base, rows=rows[-1], log_p_old=old))
        names = ("log_pf", "log_p_base", "log_p_old", "mask", "log_z", "format_penalty")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        inputs = LossInputs(**joined, prompt_index=index)
        length = LENGTH[torch.cat(rows)]

        def at_price(inputs: LossInputs = inputs) -> LossInputs:
            price = chosen.price(index)
            return replace(inputs, length_price=None if price is None else price.double())

        mismatch = tb_traj_mismatch(at_price(), alpha=alpha).detach()
        weights = objective.weight(inputs).value
        assert list(chosen.observe(mismatch, weights, length, index, index)) == []
        inputs = at_price()
        assert inputs.length_price is not None
        prices.append(inputs.length_price[::size])
        mismatch = tb_traj_mismatch(inputs, alpha=alpha).detach()
        log_z = group_log_z(mismatch, weights, index)
        optimizer.zero_grad()
        objective(replace(inputs, log_z=log_z), alpha=alpha).loss.backward()
        torch.nn.utils.clip_grad_norm_(tables, 1.0)
        optimizer.step()
        decay.step()
        seen.append([mean_length(LANGUAGE.log_probs(t.detach())) for t in tables])
    ends = [LANGUAGE.log_probs(table.detach()) for table in tables]
    return seen, ends, torch.stack(prices[-50:]).mean(0)


@pytest.mark.parametrize(
    ("alpha", "factor", "weight"),
    [(4.0, 0.8, ON_POLICY), (4.0, 1.3, PerToken(ON_POLICY)), (0.5, 1.0, PerToken(ON_POLICY))],
    ids=["4-short-sum", "4-long-per_token", "half-same-per_token"],
)
def test_training_ends_at_the_chosen_length_its_exact_price_and_the_tilted_target(
    alpha: float, factor: float, weight: Any
) -> None:
    chosen = control(factor=factor)
    seen, (log_p,), price = trained(chosen, weight, alpha, [BASE])
    target = chosen.metrics()["length_target"]  # of the first refill's samples
    assert target == pytest.approx(factor * BASE_LENGTH, rel=0.06)
    exact, root = LANGUAGE.chosen_length_target(BASE, alpha, target)
    assert total_variation(LANGUAGE.log_probs(BASE), exact) > 0.1
    assert sum(one for (one,) in seen[-50:]) / 50 == pytest.approx(target, rel=0.02)
    assert total_variation(log_p, exact) < 0.03
    assert float(price) == pytest.approx(root, abs=0.1)


def test_plain_dual_ascent_runs_past_its_place_and_following_the_policy_does_not() -> None:
    reach = {}
    for follow in (0.0, 0.5):
        chosen = control(factor=0.8, follow=follow, rate=0.3, max_step=0.2)
        seen, _, _ = trained(chosen, ON_POLICY, 4.0, [BASE], updates=300)
        target = chosen.metrics()["length_target"]
        reach[follow] = max(abs(one - target) / target for (one,) in seen[150:])
    assert reach[0.0] > 0.3
    assert reach[0.5] < 0.06


def test_each_prompt_is_given_its_own_price_or_all_of_them_one() -> None:
    bases = [BASE, LANGUAGE.bigram_base(seed=5)]
    lengths = [mean_length(LANGUAGE.log_probs(base)) for base in bases]
    assert abs(lengths[0] - lengths[1]) > 1
    for scope in ("prompt", "global"):
        chosen = control(tokens=4.0, scope=scope)
        seen, log_p, prices = trained(chosen, ON_POLICY, 2.0, bases, updates=300)
        ends = torch.tensor(seen[-50:]).mean(0)
        exact = [LANGUAGE.chosen_length_target(base, 2.0, 4.0) for base in bases]
        if scope == "prompt":
            assert ends.tolist() == pytest.approx([4.0, 4.0], rel=0.03)
            assert prices.tolist() == pytest.approx([price for _, price in exact], abs=0.15)
            for p, (target, _) in zip(log_p, exact, strict=True):
                assert total_variation(p, target) < 0.05
        else:
            assert float(ends.mean()) == pytest.approx(4.0, rel=0.02)
            assert abs(float(ends[0] - ends[1])) > 0.3
            assert float(prices[0]) == float(prices[1])


def test_a_run_that_goes_on_with_another_length_is_refused_and_an_old_one_had_none() -> None:
    point = ResumePoint(Path("last.ckpt"), 2, 1, {"strategy": "tb_traj"})
    refuse_another(point, {"length_control": "none"}, force=False)
    with pytest.raises(CheckpointError, match=r"chosen length was none, now 24 tokens \(global\)"):
        refuse_another(point, {"length_control": "24 tokens (global)"}, force=False)


# --- the state of the search ---------------------------------------------------------------------


def refill(seed: int, mean: float = 4.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    length = (mean + torch.randn(24, generator=generator)).round().clamp(min=1)
    index = torch.arange(6).repeat_interleave(4)
    mismatch = 2.0 * torch.randn(24, generator=generator)
    return mismatch, torch.ones(24), length, index, index + 10 * (seed % 2)


@pytest.mark.parametrize("scope", ["global", "prompt"])
def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been(scope: str) -> None:
    whole, first = (control(scope=scope, factor=0.8, max_step=5.0) for _ in range(2))
    for seed in range(3):
        list(whole.observe(*refill(seed)))
        list(first.observe(*refill(seed)))
    second = control(scope=scope, factor=0.8, max_step=5.0)
    second.load_state_dict(first.state_dict())
    ids = torch.arange(20)
    for seed in range(3, 6):
        list(whole.observe(*refill(seed)))
        list(second.observe(*refill(seed)))
        expected, found = whole.price(ids), second.price(ids)
        assert expected is not None
        assert found is not None
        assert torch.equal(expected, found)
        assert whole.metrics() == second.metrics()
    assert len(expected.unique()) == (1 if scope == "global" else 13)  # 12 seen, and all others


def test_the_first_price_undoes_what_the_residual_says_of_the_length() -> None:
    _, weight, length, index, ids = refill(0)
    chosen = control(factor=1.0, max_step=5.0)
    list(chosen.observe(1.5 * length, weight, length, index, ids))  # as alpha=4, b=-0.5 make it
    found = chosen.metrics()
    assert found["length_price"] == pytest.approx(-1.5, abs=1e-6)
    assert found["length_price_lead"] == pytest.approx(0.0, abs=1e-6)


def test_a_resume_that_is_forced_to_another_length_aims_at_it() -> None:
    before = control(factor=1.0)
    list(before.observe(*refill(0)))
    after = control(factor=0.5)
    after.load_state_dict(before.state_dict())
    assert after.metrics()["length_target"] == pytest.approx(
        0.5 * before.metrics()["length_target"]
    )


def test_a_residual_that_is_no_number_never_reaches_the_price() -> None:
    mismatch, *rest = refill(0)
    chosen, other = control(max_step=5.0), control(max_step=5.0)
    mismatch[3] = float("nan")
    list(chosen.observe(mismatch, *rest))
    kept = torch.arange(24) != 3
    list(other.observe(mismatch[kept], *(x[kept] for x in rest)))
    assert chosen.metrics() == other.metrics()
    list(chosen.observe(torch.full((24,), float("nan")), *rest))
    assert chosen.metrics() == other.metrics()


def test_there_is_no_price_before_the_first_refill_and_none_of_a_run_without() -> None:
    chosen = control()
    chosen.load_state_dict({})
    assert chosen.price(torch.arange(3)) is None
    assert chosen.metrics() == chosen.state_dict() == {}


def test_a_price_keeps_its_bounds_and_its_largest_step_and_says_when_it_is_stuck() -> None:
    chosen = control(tokens=3.0, bounds=[-0.3, 0.3], max_step=0.1)
    quiet = torch.zeros(24), *refill(0)[1:]
    prices, said = [], []
    for _ in range(6):
        said += list(chosen.observe(*quiet))
        prices.append(float(chosen.price(torch.zeros(1))))  # type: ignore[arg-type]
    assert prices == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
    (line,) = said
    assert "stood at its bound 0.3 for 3 refills" in line
    assert "against 3 chosen" in line


def test_a_chosen_length_that_responses_cannot_have_is_refused_or_warned_of_at_once() -> None:
    four = torch.full((24,), 4)
    for factor, shown in ((2.0, "8"), (0.2, "0.8")):
        with pytest.raises(LengthControlError, match=f"is {shown}.*between 1 and rollout"):
            list(control(factor=factor).observe(*refill(0)[:2], four, *refill(0)[3:]))
    (line,) = control(tokens=6.9).observe(*refill(0))
    assert "6.9 tokens, but the first refill's responses have" in line
