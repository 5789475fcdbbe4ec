"""Blockwise LA-TB: the same target as LA-TB, one V for every prefix, and LA-TB itself in one block.

Losses are held against loops over blocks, flows and targets against enumeration.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import FlowTable, Recipe, inputs_for
from powerflow_lit.objectives import (
    BalanceObjective,
    BlockVariance,
    ImportanceWeight,
    LossInputs,
    NonFiniteInputError,
    ObjectiveError,
    la_tb,
    la_tb_mismatch,
    tb_token,
)
from tests.language import minimise_on_all_strings, train_on_samples
from tests.reference import padded, random_batch

LANGUAGE = Language.build()
BASE = LANGUAGE.bigram_base(seed=3)
PSI = torch.where(LANGUAGE.lacks(letter=0), -0.5, 0.0).double()  # (N,)
NO_PSI = torch.zeros(len(LANGUAGE), dtype=torch.float64)
UNWEIGHTED = ImportanceWeight("none", None, None)


def la_tb_blocks(block_size: int) -> BalanceObjective:
    return BalanceObjective(la_tb_mismatch, UNWEIGHTED, BlockVariance(block_size))


def with_flow(inputs: LossInputs, block_size: int, seed: int = 0) -> LossInputs:
    """Random log V, NaN where a response has ended."""
    n, width = inputs.mask.shape
    boundaries = max(1, (width - 1) // block_size)
    generator = torch.Generator().manual_seed(seed)
    flow = torch.randn(n, boundaries, generator=generator, dtype=torch.float64)
    for row, length in enumerate(inputs.mask.sum(1).tolist()):
        for k in range(boundaries):
            if (k + 1) * block_size >= length:
                flow[row, k] = math.nan
    return replace(inputs, log_flow=flow.requires_grad_())


def loss_by_loops(inputs: LossInputs, alpha: float, block_size: int) -> Tensor:
    """Mean over responses of the mean over tokens of their block's squared residual."""
    assert inputs.log_flow is not None
    losses = []
    for row, length in enumerate(inputs.mask.sum(1).tolist()):
        square = torch.zeros((), dtype=torch.float64)
        for start in range(0, length, block_size):
            end = min(start + block_size, length)
            d = inputs.log_pf.new_zeros(())
            if start > 0:
                d = d + inputs.log_flow[row, start // block_size - 1]
            if end < length:
                d = d - inputs.log_flow[row, end // block_size - 1]
            else:
                d = d - alpha * length * inputs.format_penalty[row]
            for t in range(start, end):
                d = d + inputs.log_pf[row, t] - alpha * inputs.log_p_base[row, t]
                d = d + inputs.log_z[row]
            square = square + (end - start) * (d / (end - start)) ** 2
        losses.append(square / length)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_the_loss_and_its_gradients_are_those_of_a_loop_over_blocks(block_size: int) -> None:
    inputs = with_flow(padded(random_batch(3)), block_size)
    assert (inputs.format_penalty < 0).any()
    inputs = replace(
        inputs,
        log_pf=inputs.log_pf.clone().requires_grad_(),
        log_z=inputs.log_z.clone().requires_grad_(),
    )
    sources = (inputs.log_pf, inputs.log_z, inputs.log_flow)
    found = la_tb_blocks(block_size)(inputs, alpha=2.0).loss
    expected = loss_by_loops(inputs, 2.0, block_size)
    assert float(found) == pytest.approx(float(expected), rel=1e-10)
    pairs = zip(torch.autograd.grad(found, sources), torch.autograd.grad(expected, sources),
                strict=True)  # fmt: skip
    for own, theirs in pairs:
        assert own.isfinite().all()
        torch.testing.assert_close(own, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("block_size", [6, 7, 10**9])
def test_one_block_is_la_tb_in_loss_and_gradient_whatever_the_flow_says(block_size: int) -> None:
    inputs = padded(random_batch(3))
    inputs = replace(inputs, log_pf=inputs.log_pf.clone().requires_grad_())
    assert int(inputs.mask.sum(1).max()) <= 6
    blocks = with_flow(inputs, block_size)
    one, whole = la_tb_blocks(block_size)(blocks, alpha=2.0), la_tb(inputs, alpha=2.0)
    assert float(one.loss) == pytest.approx(float(whole.loss), rel=1e-12)
    gradients = (torch.autograd.grad(x.loss, inputs.log_pf)[0] for x in (one, whole))
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_blocks_of_a_token_with_v_1_are_tb_token_per_token() -> None:
    inputs = padded(random_batch(3, with_psi=False))
    flow = torch.zeros(len(inputs.mask), inputs.mask.shape[1] - 1, dtype=torch.float64)
    own = la_tb_blocks(1)(replace(inputs, log_flow=flow), alpha=2.0)
    token = tb_token(inputs, alpha=2.0, scale=1.0, reading="per_token")
    assert float(own.loss) == pytest.approx(float(token.loss), rel=1e-12)


def test_the_residual_is_la_tbs_and_the_spread_within_responses_is_logged() -> None:
    inputs = with_flow(padded(random_batch(3)), 2)
    own, whole = la_tb_blocks(2)(inputs, alpha=2.0), la_tb(inputs, alpha=2.0)
    assert torch.equal(own.residual, whole.residual)
    within = float(own.metrics["residual_std_within"])
    assert within**2 == pytest.approx(float(own.loss - whole.loss))
    assert within > 0.1


# --- the fixed point -----------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_the_loss_vanishes_at_la_tbs_target_with_the_enumerated_flow_and_nowhere_beside(
    block_size: int, alpha: float, psi: Tensor
) -> None:
    log_p, log_z = LANGUAGE.length_averaged_target(BASE, alpha, psi)
    flow = FlowTable(LANGUAGE, block_size)
    flow.table.data = LANGUAGE.prefix_flow(BASE, alpha, psi)
    assert float(flow.table[0].detach()) == pytest.approx(0.0, abs=1e-12)  # of the empty prefix
    there = inputs_for(LANGUAGE, LANGUAGE.logits_of(log_p), BASE, log_z=log_z, psi=psi, flow=flow)
    objective = la_tb_blocks(block_size)
    assert float(objective(there, alpha=alpha).loss) < 1e-20
    generator = torch.Generator().manual_seed(0)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    flow.table.data = moved(flow.table.data)
    other_policy = LANGUAGE.token_log_probs(moved(LANGUAGE.logits_of(log_p)))
    beside = [
        replace(there, log_flow=flow.at_boundaries(torch.arange(len(LANGUAGE)))),
        replace(there, log_pf=other_policy),
        replace(there, log_z=there.log_z + 0.1),
    ]
    for inputs in beside:
        assert float(objective(inputs, alpha=alpha).loss) > 1e-4


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_flows_of_prefixes_are_sums_over_what_may_follow(alpha: float) -> None:
    """By hand, string by string, against the table of the enumerable language."""
    _, log_z = LANGUAGE.length_averaged_target(BASE, alpha, PSI)
    token = LANGUAGE.token_log_probs(BASE)
    table = LANGUAGE.prefix_flow(BASE, alpha, PSI)
    for row in (0, 3, 17, 40):
        sums = 0.0
        for y in range(len(LANGUAGE)):
            for t in range(int(LANGUAGE.lengths[y])):
                if int(LANGUAGE.prefix[y, t]) == row:
                    length = int(LANGUAGE.lengths[y])
                    rest = float(token[y, t:length].sum())
                    sums += math.exp(
                        alpha * rest - log_z * (length - t) + alpha * length * float(PSI[y])
                    )
        assert float(table[row]) == pytest.approx(math.log(sums), abs=1e-10)


def test_psi_spread_over_the_tokens_leaves_no_flow_that_fits() -> None:
    """At the target, each string names the V of its prefix after two tokens; strings with one
    prefix agree when psi stands at the end, and do not when it is spread evenly."""
    alpha, after = 2.0, 2
    log_p, log_z = LANGUAGE.length_averaged_target(BASE, alpha, PSI)
    pf = LANGUAGE.token_log_probs(LANGUAGE.logits_of(log_p))
    pb = LANGUAGE.token_log_probs(BASE)
    first = (pf - alpha * pb + log_z)[:, :after].sum(1)  # log V after the first block
    spread = first - alpha * after * PSI
    longer = LANGUAGE.lengths > after
    for prefix in LANGUAGE.prefix[longer, after].unique():
        rows = longer & (LANGUAGE.prefix[:, after] == prefix)
        assert float(first[rows].max() - first[rows].min()) < 1e-12
        if len(PSI[rows].unique()) > 1:
            gap = float(spread[rows].max() - spread[rows].min())
            assert gap == pytest.approx(alpha * after * 0.5)
    assert len(PSI[longer].unique()) == 2


@pytest.mark.parametrize(
    ("alpha", "block_size"),
    [
        (0.5, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2.0, 1), (2.0, 3), (4.0, 2)]),
    ],
)
def test_trained_on_all_strings_policy_log_z_and_flow_end_at_their_exact_values(
    alpha: float, block_size: int
) -> None:
    log_p, log_z = LANGUAGE.length_averaged_target(BASE, alpha, PSI)
    flow = FlowTable(LANGUAGE, block_size)
    objective = partial(la_tb_blocks(block_size), alpha=alpha)
    end = minimise_on_all_strings(LANGUAGE, BASE, objective, flow, psi=PSI, flow=flow)
    print(f"TV {total_variation(end.log_p, log_p):.6f}, log Z {end.log_z:.4f} ({log_z:.4f})")
    assert total_variation(end.log_p, log_p) < 1e-3
    assert end.log_z == pytest.approx(log_z, abs=1e-3)
    lengths = LANGUAGE.prefix_lengths
    used = (lengths > 0) & (lengths % block_size == 0)
    exact = LANGUAGE.prefix_flow(BASE, alpha, PSI)
    assert exact[used].abs().max() > 0.3
    torch.testing.assert_close(flow.table.detach()[used], exact[used], atol=0.02, rtol=0.0)


@pytest.mark.slow
def test_trained_on_own_samples_it_ends_at_la_tbs_target() -> None:
    alpha = 2.0
    log_p, log_z = LANGUAGE.length_averaged_target(BASE, alpha)
    flow = FlowTable(LANGUAGE, 2)
    recipe = Recipe(steps=1000, lr=0.02, lr_z=0.1)
    objective = partial(la_tb_blocks(2), alpha=alpha)
    end = train_on_samples(LANGUAGE, BASE, objective, flow, recipe, flow=flow)
    print(f"TV {total_variation(end.log_p, log_p):.5f}, log Z {end.log_z:.4f} ({log_z:.4f})")
    assert total_variation(end.log_p, log_p) < 0.01
    assert end.log_z == pytest.approx(log_z, abs=0.02)


# --- refusals ------------------------------------------------------------------------------------


def test_flows_that_are_missing_of_another_size_or_not_finite_are_refused() -> None:
    inputs = padded(random_batch(3))
    with pytest.raises(ObjectiveError, match=r"log_flow has shape None.*strategy\.flow"):
        la_tb_blocks(2)(inputs, alpha=2.0)
    with pytest.raises(ObjectiveError, match="blocks of 1 tokens need"):
        la_tb_blocks(1)(with_flow(inputs, 2), alpha=2.0)
    broken = with_flow(inputs, 1)
    assert broken.log_flow is not None
    longest = int(inputs.mask.sum(1).argmax())
    flow = broken.log_flow.detach().clone()
    flow[longest, 0] = math.inf
    with pytest.raises(NonFiniteInputError, match="log_flow"):
        la_tb_blocks(1)(replace(broken, log_flow=flow), alpha=2.0)
    with pytest.raises(ObjectiveError, match="block_size=0"):
        BlockVariance(0)
