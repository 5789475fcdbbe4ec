"""What must not change the loss, and where its gradient may and may not go."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from powerflow_lit.objectives import LossInputs, la_tb, powerflow, tb_token, tb_traj
from tests.reference import Objective, gradients, padded, random_batch
from tests.unit.test_objectives import CASES, balance_cases, rl_cases

BALANCE = {name: objective for name, (objective, _) in balance_cases(2.0).items()}
RL = {name: objective for name, (objective, _) in rl_cases(2.0).items()}
ALL = {**BALANCE, **RL}
LOG_PROBS = ("log_pf", "log_p_base", "log_p_old")


def take(inputs: LossInputs, rows: Tensor) -> LossInputs:
    """The given rows as leaves of their own."""
    given = {f.name: x for f in fields(inputs) if (x := getattr(inputs, f.name)) is not None}
    picked = {name: x.detach()[rows] for name, x in given.items()}
    picked["log_pf"].requires_grad_()
    picked["log_z"].requires_grad_()
    return LossInputs(**picked)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


# --- padding, order, duplication, splits ---------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_amount_of_padding_changes_nothing(name: str) -> None:
    narrow, wide = (padded(random_batch(2), filler="noise", extra=k) for k in (0, 9))
    a, b = ALL[name](narrow), ALL[name](wide)
    close(b.loss, a.loss)
    close(gradients(b, wide)[0][wide.mask], gradients(a, narrow)[0][narrow.mask])
    for metric, value in a.metrics.items():
        close(b.metrics[metric], value)


@pytest.mark.parametrize("name", ALL)
def test_the_content_of_the_padding_changes_nothing(name: str) -> None:
    noise, nan = (padded(random_batch(2), filler=f) for f in ("noise", "nan"))
    a, b = ALL[name](noise), ALL[name](nan)
    assert torch.equal(a.loss, b.loss)
    for metric, value in a.metrics.items():
        assert torch.equal(b.metrics[metric], value), metric


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_trajectories_changes_nothing(name: str) -> None:
    inputs = padded(random_batch(3))
    order = torch.tensor(random.Random(0).sample(range(12), 12))
    shuffled = take(inputs, order)
    a, b = ALL[name](inputs), ALL[name](shuffled)
    close(b.loss, a.loss)
    close(b.residual, a.residual[order])
    (a_pf, a_z), (b_pf, b_z) = gradients(a, inputs), gradients(b, shuffled)
    on = shuffled.mask
    close(b_pf[on], a_pf[order][on])
    close(b_z, a_z[order])


@pytest.mark.parametrize("name", ALL)
def test_the_numbering_of_prompts_changes_nothing(name: str) -> None:
    inputs = padded(random_batch(3))
    renumbered = replace(inputs, prompt_index=1000 - inputs.prompt_index)
    close(ALL[name](renumbered).loss, ALL[name](inputs).loss)


@pytest.mark.parametrize("name", ALL)
def test_a_second_copy_of_every_prompt_changes_nothing(name: str) -> None:
    inputs = padded(random_batch(4))
    twice = take(inputs, torch.arange(12).repeat(2))
    apart = torch.cat([inputs.prompt_index, inputs.prompt_index + 1])
    twice = replace(twice, prompt_index=apart)
    a, b = ALL[name](inputs), ALL[name](twice)
    close(b.loss, a.loss)
    (a_pf, a_z), (b_pf, b_z) = gradients(a, inputs), gradients(b, twice)
    on = inputs.mask
    close((b_pf[:12] + b_pf[12:])[on], a_pf[on])
    close(b_pf[:12][on], b_pf[12:][on])
    close(b_z[:12] + b_z[12:], a_z)


@pytest.mark.parametrize("cut", [1, 5, 6, 11])
@pytest.mark.parametrize("name", BALANCE)
def test_microbatches_weighted_by_their_trajectories_make_up_the_whole(name: str, cut: int) -> None:
    """Even a cut through a prompt's group, since log Z is given."""
    inputs = padded(random_batch(5))
    whole = BALANCE[name](inputs)
    parts = [take(inputs, rows) for rows in torch.arange(12).split([cut, 12 - cut])]
    share = [len(part.mask) / 12 for part in parts]
    outputs = [BALANCE[name](part) for part in parts]
    close(sum(w * o.loss for w, o in zip(share, outputs, strict=True)), whole.loss)

    by_part = [gradients(o, part) for o, part in zip(outputs, parts, strict=True)]
    by_pf = torch.cat([w * g[0] for w, g in zip(share, by_part, strict=True)])
    by_z = torch.cat([w * g[1] for w, g in zip(share, by_part, strict=True)])
    whole_pf, whole_z = gradients(whole, inputs)
    close(by_pf[inputs.mask], whole_pf[inputs.mask])
    close(by_z, whole_z)


@pytest.mark.parametrize("name", RL)
def test_microbatches_of_whole_groups_make_up_the_whole_in_rl(name: str) -> None:
    inputs = padded(random_batch(5))
    prompts = inputs.prompt_index.unique()
    rows = [torch.nonzero(inputs.prompt_index == p).flatten() for p in prompts]
    first, rest = rows[0], torch.cat(rows[1:])
    parts = [(len(r) / 12, RL[name](take(inputs, r)).loss) for r in (first, rest)]
    close(sum(share * loss for share, loss in parts), RL[name](inputs).loss)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompts=st.integers(1, 4),
    rollouts=st.integers(2, 5),
    longest=st.integers(1, 9),
    alpha=st.floats(0.1, 8.0),
    epsilon=st.floats(0.01, 0.99),
)
def test_powerflow_is_finite_non_negative_and_blind_to_order_and_padding_on_any_batch(
    seed: int, prompts: int, rollouts: int, longest: int, alpha: float, epsilon: float
) -> None:
    batch = random_batch(seed, prompts=prompts, rollouts=rollouts, longest=longest)
    inputs = padded(batch, filler="mixed", extra=seed % 4)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    objective = partial(powerflow, alpha=alpha, epsilon=epsilon)
    output, shuffled = objective(inputs), objective(take(inputs, order))
    assert float(output.loss) >= 0.0
    assert torch.isfinite(gradients(output, inputs)[0][inputs.mask]).all()
    torch.testing.assert_close(shuffled.loss, output.loss, atol=1e-10, rtol=1e-10)
    if float(output.loss) > 1e-9:  # la_tb is within the clip range of powerflow
        ratio = float(output.loss / la_tb(inputs, alpha=alpha).loss)
        assert 1.0 - epsilon - 1e-9 <= ratio <= 1.0 + epsilon + 1e-9


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_reaches_the_policy_and_never_base_behaviour_or_psi(name: str) -> None:
    inputs = padded(random_batch(6), filler="noise")
    for field in (*LOG_PROBS, "log_z", "format_penalty"):
        getattr(inputs, field).requires_grad_().grad = None
    ALL[name](inputs).loss.backward()
    assert inputs.log_pf.grad is not None
    assert (inputs.log_pf.grad[inputs.mask] != 0).any()
    for field in ("log_p_base", "log_p_old", "format_penalty"):
        assert getattr(inputs, field).grad is None, field


@pytest.mark.parametrize("name", BALANCE)
def test_the_gradient_reaches_log_z_of_every_trajectory(name: str) -> None:
    inputs = padded(random_batch(6))
    _, by_z = gradients(BALANCE[name](inputs), inputs)
    assert (by_z != 0).all()


@pytest.mark.parametrize("name", RL)
def test_a_policy_gradient_has_no_use_for_log_z(name: str) -> None:
    inputs = padded(random_batch(6))
    elsewhere = replace(inputs, log_z=inputs.log_z + 5.0)
    assert torch.equal(RL[name](inputs).loss, RL[name](elsewhere).loss)


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_is_logged_carries_a_gradient(name: str) -> None:
    output = ALL[name](padded(random_batch(6)))
    assert output.loss.requires_grad
    assert not output.residual.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("name", CASES)
def test_an_objective_leaves_its_inputs_as_they_were(name: str) -> None:
    inputs = padded(random_batch(6), filler="noise")
    given = {f.name: x for f in fields(inputs) if (x := getattr(inputs, f.name)) is not None}
    before = {name: x.detach().clone() for name, x in given.items()}
    CASES[name][0](inputs).loss.backward()
    for field, value in before.items():
        assert torch.equal(getattr(inputs, field), value), field


# --- the identity at alpha = 1 -------------------------------------------------------------------


IDENTITIES: dict[str, Objective] = {
    "powerflow": partial(powerflow, alpha=1.0, epsilon=0.2),
    "la_tb": partial(la_tb, alpha=1.0),
    "tb_traj": partial(tb_traj, alpha=1.0),
    "tb_token energy": partial(tb_token, alpha=1.0, scale=3.0, reading="energy"),
    "tb_token per_token": partial(tb_token, alpha=1.0, scale=3.0, reading="per_token"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IDENTITIES)
def test_at_alpha_one_the_base_itself_has_exactly_zero_loss_and_gradient(
    name: str, dtype: torch.dtype
) -> None:
    inputs = padded(random_batch(7, with_psi=False), dtype=dtype, filler="noise")
    at_base = replace(
        inputs,
        log_p_base=inputs.log_pf.detach().clone(),
        log_z=torch.zeros_like(inputs.log_z).requires_grad_(),
    )
    output = IDENTITIES[name](at_base)
    by_pf, by_z = gradients(output, at_base)
    assert float(output.loss) == 0.0
    assert torch.equal(by_pf, torch.zeros_like(by_pf))
    assert torch.equal(by_z, torch.zeros_like(by_z))
    assert float(IDENTITIES[name](inputs).loss) > 0.01  # away from the base it is not zero


@pytest.mark.parametrize("name", IDENTITIES)
def test_at_alpha_one_psi_moves_the_target_away_from_the_base(name: str) -> None:
    inputs = padded(random_batch(7), filler="noise")
    at_base = replace(
        inputs, log_p_base=inputs.log_pf.detach(), log_z=torch.zeros_like(inputs.log_z)
    )
    loss = float(IDENTITIES[name](at_base).loss)
    if name == "tb_token energy":  # its energy, psi included, is switched off by alpha - 1 = 0
        assert loss == 0.0
    else:
        assert loss > 0.01
