"""Objectives refuse what lies outside their domain, and the message names the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from powerflow_lit.objectives import (
    ImportanceWeight,
    LossInputs,
    LossOutput,
    NonFiniteInputError,
    ObjectiveError,
    PolicyGradientObjective,
    la_tb,
    la_tb_mismatch,
    powerflow,
    rl_token,
    rl_traj,
    tb_token,
    tb_token_mismatch,
    tb_traj,
    tb_traj_mismatch,
)
from tests.reference import padded, random_batch

NONE = ImportanceWeight("none", None, None)
RL_OPTIONS = {
    "kl": "in_reward",
    "advantage": "rloo",
    "reduction": "sequence_sum",
    "weight": NONE,
}

BALANCE: dict[str, Callable[..., LossOutput]] = {
    "powerflow": partial(powerflow, epsilon=0.2),
    "la_tb": la_tb,
    "tb_traj": tb_traj,
    "tb_token": partial(tb_token, scale=3.0, reading="energy"),
}
RL: dict[str, Callable[..., LossOutput]] = {
    "rl_traj": partial(rl_traj, **RL_OPTIONS),
    "rl_token": partial(rl_token, **RL_OPTIONS),
}
ALL = {**BALANCE, **RL}


@pytest.fixture
def inputs() -> LossInputs:
    return padded(random_batch(1))


def with_value(inputs: LossInputs, field: str, row: int, column: int, value: float) -> LossInputs:
    changed: Tensor = getattr(inputs, field).detach().clone()
    changed[row, column] = value
    return replace(inputs, **{field: changed})


@pytest.mark.parametrize("name", ALL)
def test_every_objective_accepts_the_batch_that_the_refusals_start_from(
    name: str, inputs: LossInputs
) -> None:
    assert math.isfinite(float(ALL[name](inputs, alpha=2.0).loss))


@pytest.mark.parametrize("alpha", [0.0, -1.5, math.inf, math.nan])
@pytest.mark.parametrize("name", ALL)
def test_alpha_must_be_positive_and_finite(name: str, alpha: float, inputs: LossInputs) -> None:
    with pytest.raises(ObjectiveError, match=f"alpha={alpha}"):
        ALL[name](inputs, alpha=alpha)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("name", RL)
def test_rl_needs_alpha_above_one(name: str, alpha: float, inputs: LossInputs) -> None:
    with pytest.raises(ObjectiveError, match=rf"alpha={alpha}.*{name}.*alpha > 1"):
        RL[name](inputs, alpha=alpha)


@pytest.mark.parametrize(
    "mismatch",
    [
        la_tb_mismatch,
        tb_traj_mismatch,
        partial(tb_token_mismatch, scale=1.0, reading="power"),
    ],
)
def test_a_mismatch_on_its_own_refuses_alpha_as_well(
    mismatch: Callable[..., Tensor], inputs: LossInputs
) -> None:
    with pytest.raises(ObjectiveError, match="alpha=-2"):
        mismatch(inputs, alpha=-2)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_epsilon_must_lie_strictly_between_zero_and_one(epsilon: float, inputs: LossInputs) -> None:
    with pytest.raises(ObjectiveError, match=f"epsilon={epsilon}"):
        powerflow(inputs, alpha=2.0, epsilon=epsilon)
    with pytest.raises(ObjectiveError, match=f"epsilon={epsilon}"):
        ImportanceWeight("seq_sum", epsilon, 0.2)


@pytest.mark.parametrize("high", [0.0, -0.1, math.nan])
def test_the_upper_clip_range_must_be_positive(high: float) -> None:
    with pytest.raises(ObjectiveError, match=f"epsilon_high={high}"):
        ImportanceWeight("seq_sum", 0.2, high)


@pytest.mark.parametrize("name", ALL)
def test_a_trajectory_without_tokens_is_refused_by_its_number(
    name: str, inputs: LossInputs
) -> None:
    mask = inputs.mask.clone()
    mask[[2, 5]] = False
    with pytest.raises(ObjectiveError, match=r"\[2, 5\] have an empty mask"):
        ALL[name](replace(inputs, mask=mask), alpha=2.0)


@pytest.mark.parametrize("name", ALL)
def test_an_update_without_trajectories_is_refused(name: str, inputs: LossInputs) -> None:
    given = {n: x for n in inputs.__dataclass_fields__ if (x := getattr(inputs, n)) is not None}
    fields = {name: x[:0] for name, x in given.items()}
    with pytest.raises(ObjectiveError, match="no trajectories"):
        ALL[name](LossInputs(**fields), alpha=2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["log_pf", "log_p_base", "log_p_old"])
@pytest.mark.parametrize("name", ALL)
def test_a_non_finite_token_is_refused_with_its_place(
    name: str, field: str, value: float, inputs: LossInputs
) -> None:
    with pytest.raises(NonFiniteInputError, match=f"{field} is {value} at trajectory 1, token 3"):
        ALL[name](with_value(inputs, field, 1, 3, value), alpha=2.0)


@pytest.mark.parametrize("field", ["log_z", "format_penalty"])
@pytest.mark.parametrize("name", ALL)
def test_a_non_finite_log_z_or_penalty_is_refused_by_name(
    name: str, field: str, inputs: LossInputs
) -> None:
    changed = getattr(inputs, field).detach().clone()
    changed[0] = -math.inf
    with pytest.raises(NonFiniteInputError, match=rf"{field}.*-inf"):
        ALL[name](replace(inputs, **{field: changed}), alpha=2.0)


@pytest.mark.parametrize("name", ALL)
def test_a_positive_psi_is_refused_with_its_value(name: str, inputs: LossInputs) -> None:
    psi = inputs.format_penalty.clone()
    psi[4] = 0.25
    with pytest.raises(ObjectiveError, match=r"format_penalty is 0\.25"):
        ALL[name](replace(inputs, format_penalty=psi), alpha=2.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("kl", "k4"), ("advantage", "critic"), ("reduction", "sum"), ("reduction", "")],
)
@pytest.mark.parametrize("objective", [rl_traj, rl_token])
def test_an_unknown_rl_option_is_refused_by_name(
    objective: Callable[..., LossOutput], option: str, value: str, inputs: LossInputs
) -> None:
    with pytest.raises(ObjectiveError, match=f"'{value}'"):
        objective(inputs, alpha=2.0, **{**RL_OPTIONS, option: value})


def test_an_unknown_rl_energy_is_refused_by_name(inputs: LossInputs) -> None:
    with pytest.raises(ObjectiveError, match="'sentence'"):
        PolicyGradientObjective("sentence", "in_reward", "rloo", "sequence_sum", NONE)(  # type: ignore[arg-type]
            inputs, alpha=2.0
        )


def test_an_unknown_reading_of_tb_token_is_refused_by_name(inputs: LossInputs) -> None:
    with pytest.raises(ObjectiveError, match=r"'literal'.*energy.*power.*per_token"):
        tb_token(inputs, alpha=2.0, scale=1.0, reading="literal")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.0, -3.0, math.nan])
def test_the_scale_of_tb_token_must_be_positive(scale: float, inputs: LossInputs) -> None:
    with pytest.raises(ObjectiveError, match=f"scale={scale}"):
        tb_token(inputs, alpha=2.0, scale=scale, reading="energy")


def test_an_unknown_weight_kind_is_refused_by_name() -> None:
    with pytest.raises(ObjectiveError, match=r"'sequence'.*seq_sum"):
        ImportanceWeight("sequence", 0.2, 0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [rl_traj, rl_token])
def test_rloo_refuses_a_prompt_with_a_single_rollout(objective: Callable[..., LossOutput]) -> None:
    lonely = padded(random_batch(1).select([0, 1, 3, 4, 5]))  # the third prompt keeps one rollout
    with pytest.raises(ObjectiveError, match=r"single rollout.*samples_per_prompt"):
        objective(lonely, alpha=2.0, **RL_OPTIONS)
    group = objective(lonely, alpha=2.0, **{**RL_OPTIONS, "advantage": "group"})
    assert math.isfinite(float(group.loss))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("mask", lambda x: x.float()),
        ("mask", lambda x: x[0]),
        ("log_pf", lambda x: x[:, :-1]),
        ("log_p_base", lambda x: x[:-1]),
        ("log_p_old", lambda x: x.sum(1)),
        ("log_z", lambda x: x[:1]),
        ("format_penalty", lambda x: x[:, None]),
        ("prompt_index", lambda x: x[:-1]),
    ],
)
def test_a_field_of_the_wrong_shape_or_type_is_refused_by_name(
    field: str, change: Callable[[Tensor], Tensor], inputs: LossInputs
) -> None:
    with pytest.raises(ObjectiveError, match=field):
        replace(inputs, **{field: change(getattr(inputs, field))})


def test_the_refusals_are_value_errors() -> None:
    assert issubclass(NonFiniteInputError, ObjectiveError)
    assert issubclass(ObjectiveError, ValueError)
    assert torch.isnan(padded(random_batch(1), filler="nan").log_pf).any()  # padding may be NaN
