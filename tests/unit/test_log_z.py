"""Closed forms of log Z and the modes of `log_z=` that use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import Recipe
from powerflow_lit.log_z import (
    EmaLogZ,
    FixedLogZ,
    GroupLogZ,
    GroupLooLogZ,
    HeadLogZ,
    LogZContext,
)
from powerflow_lit.objectives import (
    ImportanceWeight,
    LossInputs,
    ObjectiveError,
    group_log_z,
    la_tb,
    la_tb_mismatch,
    leave_one_out_log_z,
    powerflow,
    tb_traj,
    tb_traj_mismatch,
)
from tests.language import minimise_on_all_strings, train_on_samples
from tests.reference import assert_near, padded, random_batch

ALPHA, EPSILON = 2.0, 0.2

GROUPS = st.lists(
    st.tuples(st.integers(0, 3), st.floats(-5.0, 5.0), st.floats(0.1, 3.0)),
    min_size=2,
    max_size=12,
)
Rows = list[tuple[int, float, float]]  # prompt, mismatch, weight


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def columns(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    prompt, mismatch, weight = zip(*rows, strict=True)
    return (
        torch.tensor(mismatch, dtype=torch.float64),
        torch.tensor(weight, dtype=torch.float64),
        torch.tensor(prompt),
    )


def weighted_loss(log_z: Tensor, mismatch: Tensor, weight: Tensor) -> Tensor:
    return (weight * (log_z + mismatch) ** 2).mean()


# --- closed forms --------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(rows=GROUPS)
def test_group_log_z_is_minus_each_prompts_weighted_mean_mismatch(rows: Rows) -> None:
    found = group_log_z(*columns(rows))
    for i, (prompt, _, _) in enumerate(rows):
        own = [(u, w) for q, u, w in rows if q == prompt]
        mean = np.average([u for u, _ in own], weights=[w for _, w in own])
        assert float(found[i]) == pytest.approx(-float(mean), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(rows=GROUPS, step=st.floats(0.01, 3.0), sign=st.sampled_from([-1.0, 1.0]))
def test_group_log_z_minimises_the_loss(rows: Rows, step: float, sign: float) -> None:
    mismatch, weight, prompt = columns(rows)
    best = group_log_z(mismatch, weight, prompt)
    moved = torch.where(prompt == prompt[0], best + sign * step, best)
    there, beside = (weighted_loss(z, mismatch, weight) for z in (best, moved))
    rise = step**2 * weight[prompt == prompt[0]].sum() / len(rows)
    assert float(beside - there) == pytest.approx(float(rise), rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(rows=GROUPS)
def test_at_group_log_z_the_loss_is_the_weighted_variance_within_prompts(rows: Rows) -> None:
    mismatch, weight, prompt = columns(rows)
    loss = weighted_loss(group_log_z(mismatch, weight, prompt), mismatch, weight)
    total = 0.0
    for q in set(prompt.tolist()):
        u, w = mismatch[prompt == q].numpy(), weight[prompt == q].numpy()
        total += w.sum() * np.average((u - np.average(u, weights=w)) ** 2, weights=w)
    assert float(loss) == pytest.approx(total / len(rows), abs=1e-10)


@settings(max_examples=80, deadline=None)
@given(rows=GROUPS)
def test_the_gradient_is_the_same_whether_group_log_z_is_attached_or_detached(rows: Rows) -> None:
    mismatch, weight, prompt = columns(rows)
    mismatch.requires_grad_()
    same = (prompt[:, None] == prompt[None, :]).double()
    attached_z = -(same @ (weight * mismatch)) / (same @ weight)
    detached_z = group_log_z(mismatch, weight, prompt)
    assert attached_z.requires_grad
    assert not detached_z.requires_grad
    torch.testing.assert_close(detached_z, attached_z.detach(), atol=1e-12, rtol=1e-12)
    attached, detached = (
        torch.autograd.grad(weighted_loss(z, mismatch, weight), mismatch)[0]
        for z in (attached_z, detached_z)
    )
    torch.testing.assert_close(attached, detached, atol=1e-12, rtol=1e-10)


def test_a_wrong_log_z_does_make_attaching_matter() -> None:
    """The equality above comes from the minimum, not from the loss."""
    mismatch, weight, _ = columns([(0, 1.0, 1.0), (0, 3.0, 1.0)])
    mismatch.requires_grad_()
    off = 1.0 - mismatch.mean()
    attached, detached = (
        torch.autograd.grad(weighted_loss(z, mismatch, weight), mismatch)[0]
        for z in (off, off.detach())
    )
    assert (attached - detached).abs().min() > 0.1


@settings(max_examples=80, deadline=None)
@given(rows=GROUPS)
def test_leave_one_out_takes_the_other_rollouts_of_the_prompt_only(rows: Rows) -> None:
    rows = rows + rows  # two or more rollouts for each prompt
    found = leave_one_out_log_z(*columns(rows))
    for i, (prompt, _, _) in enumerate(rows):
        others = [(u, w) for j, (q, u, w) in enumerate(rows) if q == prompt and j != i]
        mean = np.average([u for u, _ in others], weights=[w for _, w in others])
        assert float(found[i]) == pytest.approx(-float(mean), abs=1e-9)


@pytest.mark.parametrize("rollouts", [2, 4, 9])
def test_leave_one_out_residuals_are_g_over_g_minus_one_times_those_of_the_group(
    rollouts: int,
) -> None:
    u = torch.randn(rollouts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones, prompt = torch.ones_like(u), torch.zeros(rollouts, dtype=torch.long)
    group = group_log_z(u, ones, prompt) + u
    alone = leave_one_out_log_z(u, ones, prompt) + u
    torch.testing.assert_close(alone, group * rollouts / (rollouts - 1), atol=1e-12, rtol=1e-12)


def test_leave_one_out_refuses_a_single_rollout_and_the_group_mean_takes_it() -> None:
    mismatch, weight, prompt = columns([(0, 1.0, 1.0), (0, 2.0, 1.0), (5, 3.0, 1.0)])
    with pytest.raises(ObjectiveError, match=r"single rollout.*samples_per_prompt"):
        leave_one_out_log_z(mismatch, weight, prompt)
    assert group_log_z(mismatch, weight, prompt).tolist() == [-1.5, -1.5, -3.0]


@pytest.mark.parametrize(
    ("objective", "mismatch", "weight"),
    [
        (
            partial(powerflow, epsilon=EPSILON),
            la_tb_mismatch,
            ImportanceWeight("seq_sum", EPSILON, EPSILON),
        ),
        (la_tb, la_tb_mismatch, ImportanceWeight("none", None, None)),
        (tb_traj, tb_traj_mismatch, ImportanceWeight("none", None, None)),
    ],
    ids=["powerflow", "la_tb", "tb_traj"],
)
def test_the_closed_form_of_an_objectives_own_pieces_stills_its_gradient_in_log_z(
    objective: Callable[..., object], mismatch: Callable[..., Tensor], weight: ImportanceWeight
) -> None:
    inputs = padded(random_batch(3))
    u, w = mismatch(inputs, alpha=ALPHA), weight(inputs).value
    log_z = group_log_z(u, w, inputs.prompt_index).requires_grad_()
    loss = objective(replace(inputs, log_z=log_z), alpha=ALPHA).loss  # type: ignore[attr-defined]
    (by_z,) = torch.autograd.grad(loss, log_z)
    assert by_z.abs().max() > 1e-3  # rollouts pull either way,
    for prompt in inputs.prompt_index.unique():  # but those of one prompt cancel
        assert by_z[inputs.prompt_index == prompt].sum().abs() < 1e-12


def test_psi_enters_the_closed_form() -> None:
    inputs = padded(random_batch(3))
    assert (inputs.format_penalty < 0).any()
    without = replace(inputs, format_penalty=torch.zeros_like(inputs.format_penalty))
    with_psi, plain = (
        group_log_z(la_tb_mismatch(i, alpha=ALPHA), torch.ones(12).double(), i.prompt_index)
        for i in (inputs, without)
    )
    psi = group_log_z(inputs.format_penalty, torch.ones(12).double(), inputs.prompt_index)
    torch.testing.assert_close(with_psi, plain - ALPHA * psi, atol=1e-12, rtol=1e-12)


# --- modes ---------------------------------------------------------------------------------------


def context(rows: Rows, state: Tensor | None = None) -> LogZContext:
    """The task's prompt ids are 100 + the group's number."""
    mismatch, weight, prompt = columns(rows)
    return LogZContext(mismatch, weight, prompt, prompt + 100, state)


ROWS: Rows = [(0, 1.0, 1.0), (0, 3.0, 1.0), (1, 10.0, 0.5), (1, 4.0, 1.0)]
GROUP = [-2.0, -2.0, -6.0, -6.0]


def test_the_group_mode_is_the_closed_form_of_every_prompt() -> None:
    assert_near(GroupLogZ()(context(ROWS)), GROUP, 1e-12)


def test_the_leave_one_out_mode_is_the_closed_form_of_the_others() -> None:
    assert_near(GroupLooLogZ()(context(ROWS)), [-3.0, -1.0, -4.0, -10.0], 1e-12)


def test_the_fixed_mode_is_its_constant() -> None:
    assert_near(FixedLogZ(value=-0.7)(context(ROWS)), [-0.7] * 4, 1e-12)


def test_a_global_moving_average_answers_with_the_past_and_then_takes_in_the_present() -> None:
    ema = EmaLogZ(rate=0.25, scope="global")
    ema.initialise(-1.0)
    assert_near(ema(context(ROWS)), [-1.0] * 4, 1e-6)
    assert_near(ema(context(ROWS)), [-1.0 + 0.25 * (-4.0 + 1.0)] * 4, 1e-6)


def test_a_moving_average_per_prompt_keeps_prompts_apart() -> None:
    ema = EmaLogZ(rate=0.5, scope="prompt")
    ema.initialise(-1.0)
    ema(context(ROWS))
    assert_near(ema(context(ROWS)), [-1.5, -1.5, -3.5, -3.5], 1e-6)
    unseen = replace(context(ROWS), prompt_id=torch.tensor([7, 7, 7, 7]))
    assert_near(ema(unseen), [-1.0] * 4, 1e-6)


def test_a_moving_average_stands_still_without_training_or_gradient() -> None:
    ema = EmaLogZ(rate=0.5, scope="global")
    with torch.no_grad():
        ema(context(ROWS))
    ema.eval()
    ema(context(ROWS))
    assert_near(ema(context(ROWS)), [0.0] * 4, 1e-12)


def test_a_moving_average_survives_a_mismatch_that_is_not_finite() -> None:
    """The objective refuses that step; the average must not remember it."""
    ema = EmaLogZ(rate=0.5, scope="global")
    ema.initialise(-1.0)
    ema(context([(0, math.nan, 1.0), (0, 1.0, 1.0)]))
    ema(context([(0, math.inf, 1.0), (0, 1.0, 1.0)]))
    assert_near(ema(context(ROWS)), [-1.0] * 4, 1e-6)


@pytest.mark.parametrize("scope", ["global", "prompt"])
def test_a_moving_average_returns_from_its_state_dict(scope: str) -> None:
    first, second = (EmaLogZ(rate=0.5, scope=scope) for _ in range(2))  # type: ignore[arg-type]
    first.initialise(-1.0)
    first(context(ROWS))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(context(ROWS)), first(context(ROWS)))


@pytest.mark.parametrize("mode", [GroupLogZ(), GroupLooLogZ(), EmaLogZ(rate=0.1, scope="global")])
def test_modes_without_a_head_pass_no_gradient_to_the_policy(mode: nn.Module) -> None:
    live = context(ROWS)
    live.mismatch.requires_grad_()
    assert not mode(live).requires_grad


def head(*, detach: bool = True) -> HeadLogZ:
    torch.manual_seed(0)
    built = HeadLogZ(source="policy", detach=detach, pool="mean", width=16, warmup_steps=0)
    built.build(hidden_size=8)
    return built.double()


def test_a_head_starts_at_the_value_it_is_told_for_every_prompt() -> None:
    states = torch.randn(4, 8, dtype=torch.float64)
    start = head()
    start.initialise(-1.25)
    assert_near(start(context(ROWS, states)), [-1.25] * 4, 1e-12)


@pytest.mark.parametrize("detach", [True, False])
def test_a_heads_gradient_reaches_the_trunk_only_if_it_is_not_detached(detach: bool) -> None:
    states = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mode = head(detach=detach)
    nn.init.normal_(mode.head.out.weight)
    mode(context(ROWS, states)).sum().backward()
    assert all(p.grad is not None for p in mode.head.out.parameters())
    assert (states.grad is None) == detach


# --- the fixed point that the modes share --------------------------------------------------------


class OnePrompt(nn.Module):
    """A mode of the project, asked about the one prompt of the enumerated language."""

    def __init__(self, mode: nn.Module, alpha: float) -> None:
        super().__init__()
        self.mode, self.alpha = mode, alpha
        self.state = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)

    def forward(self, inputs: LossInputs) -> Tensor:
        n = len(inputs.mask)
        ones = torch.ones(n, dtype=torch.float64)
        mismatch = la_tb_mismatch(inputs, alpha=self.alpha).detach()
        states = self.state.expand(n, -1)
        return self.mode(
            LogZContext(mismatch, ones, inputs.prompt_index, inputs.prompt_index, states)
        )


@pytest.mark.parametrize("name", ["head", "group", "group_loo"])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_on_all_strings_head_group_and_leave_one_out_share_the_exact_fixed_point(
    name: str, alpha: float
) -> None:
    language = Language.build()
    base = language.bigram_base(seed=3)
    exact, log_z = language.length_averaged_target(base, alpha)
    mode = {"head": head, "group": GroupLogZ, "group_loo": GroupLooLogZ}[name]()
    end = minimise_on_all_strings(
        language, base, partial(la_tb, alpha=alpha), OnePrompt(mode, alpha)
    )
    print(f"{name} alpha={alpha}: TV {total_variation(end.log_p, exact):.5f}, log Z {end.log_z}")
    assert total_variation(end.log_p, exact) < 5e-3
    assert end.log_z == pytest.approx(log_z, abs=5e-3)


@pytest.mark.parametrize("name", ["head", "group", "group_loo", "ema"])
def test_on_own_samples_head_group_leave_one_out_and_average_share_the_exact_fixed_point(
    name: str,
) -> None:
    alpha = 2.0
    language = Language.build()
    base = language.bigram_base(seed=3)
    exact, log_z = language.length_averaged_target(base, alpha)
    mode = {
        "head": head,
        "group": GroupLogZ,
        "group_loo": GroupLooLogZ,
        "ema": partial(EmaLogZ, rate=0.1, scope="global"),
    }[name]()
    recipe = Recipe(steps=900, lr=0.02, lr_z=0.01)
    objective = partial(powerflow, alpha=alpha, epsilon=EPSILON)
    end = train_on_samples(language, base, objective, OnePrompt(mode, alpha), recipe)
    print(f"{name} samples: TV {total_variation(end.log_p, exact):.5f}, log Z {end.log_z}")
    assert total_variation(end.log_p, exact) < 0.01
    assert end.log_z == pytest.approx(log_z, abs=0.01)
