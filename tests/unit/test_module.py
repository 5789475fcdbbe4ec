"""PowerFlowModule: what is trained, what is not, and the modes of log Z."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from powerflow_lit.length_control import ChosenLength, LengthControl
from powerflow_lit.log_z import EmaLogZ, FixedLogZ, GroupLogZ, GroupLooLogZ, HeadLogZ, LogZ
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.objectives import (
    BalanceObjective,
    ImportanceWeight,
    PerToken,
    PolicyGradientObjective,
    la_tb_mismatch,
    powerflow,
    tb_token_mismatch,
    tb_traj_mismatch,
    token_variance,
)
from powerflow_lit.schedules import anneal, constant
from powerflow_lit.types import TokenBatch, TrajectoryBatch

EQ_10 = ImportanceWeight("seq_sum", 0.2, 0.2)
NO_WEIGHT = ImportanceWeight("none", None, None)
HEAD: dict[str, Any] = {"detach": True, "pool": "mean", "width": 16, "warmup_steps": 0}


def head(**changes: Any) -> HeadLogZ:
    return HeadLogZ(**{"source": "policy", **HEAD, **changes})


def module(
    log_z: LogZ | None = None, objective: Any = None, tokens: int = 10_000, **changes: Any
) -> PowerFlowModule:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "policy": LlamaForCausalLM(config).eval(),
        "objective": objective or BalanceObjective(la_tb_mismatch, EQ_10),
        "log_z": log_z or head(),
        "alpha": 3.0,
        "alpha_schedule": constant,
        "length_control": LengthControl(),
        "format_penalty": -0.5,
        "calibrate": {},
        "loss_scale": 1.0,
        "lr": 1e-3,
        "log_z_lr": 1e-2,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "grad_clip": 1.0,
        "log_z_grad_clip": 1.0,
        "fused_optimizer": None,
        "max_skipped_in_a_row": 3,
        "tokens_per_microbatch": tokens,
        "logit_chunk_mb": 1.0,
    }
    return PowerFlowModule(**{**settings, **changes})


def batch(groups: int = 3, samples: int = 4) -> TrajectoryBatch:
    """Ragged rollouts whose stored log-probs are those of a fresh module's base."""
    generator = torch.Generator().manual_seed(1)
    rows, index = [], []
    for group in range(groups):
        prompt = torch.randint(3, 40, (2 + group,), generator=generator).tolist()
        for sample in range(samples):
            size = 1 + (3 * group + 2 * sample) % 7
            rows.append((prompt, torch.randint(3, 40, (size,), generator=generator).tolist()))
            index.append(group)
    tokens = TokenBatch.collate(rows, pad_id=0)
    n, width = tokens.mask.shape
    made = TrajectoryBatch(
        tokens=tokens,
        log_p_base=torch.zeros(n, width),
        log_p_old=torch.zeros(n, width),
        formatted=torch.arange(n) % 3 > 0,
        prompt_index=torch.tensor(index),
        prompt_id=torch.tensor(index) + 100,
        policy_version=torch.zeros(n, dtype=torch.long),
    )
    with torch.no_grad():
        scores = module().policy_scores(made).log_prob
    return TrajectoryBatch(**{**vars(made), "log_p_base": scores, "log_p_old": scores.clone()})


def step(trained: PowerFlowModule, data: TrajectoryBatch) -> Tensor:
    """One step's loss, gradients in place."""
    loss = trained.training_step(data, 0)
    assert loss is not None
    loss.backward()
    return loss


def gradients(trained: PowerFlowModule) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trained.policy.parameters() if p.grad is not None])


def test_the_step_is_the_objective_of_the_paper_on_the_policys_log_probs() -> None:
    trained, data = module(FixedLogZ(value=-0.7)), batch()
    with torch.no_grad():  # move off the base
        trained.policy.lm_head.weight.add_(0.05 * torch.randn_like(trained.policy.lm_head.weight))
    loss = step(trained, data)
    with torch.no_grad():
        scores = trained.policy_scores(data).log_prob
    inputs = trained.loss_inputs(data, scores)
    assert inputs.format_penalty.unique().tolist() == [-0.5, 0.0]
    inputs = type(inputs)(**{**vars(inputs), "log_z": torch.full_like(inputs.log_z, -0.7)})
    assert loss.item() == pytest.approx(powerflow(inputs, alpha=3.0, epsilon=0.2).loss.item())


def test_gradients_reach_policy_and_head_and_never_the_base() -> None:
    trained = module(head())
    step(trained, batch())
    assert all(p.grad is not None for p in trained.policy.parameters())
    assert trained.log_z.head.out.bias.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert all(not p.requires_grad and p.grad is None for p in trained.base.parameters())


def test_the_base_is_neither_parameter_nor_submodule_nor_in_the_state() -> None:
    trained = module(head())
    ours = {id(p) for p in trained.parameters()}
    assert not ours & {id(p) for p in trained.base.parameters()}
    assert {name.split(".")[0] for name in trained.state_dict()} == {"policy", "log_z"}
    optimizer = trained.configure_optimizers()["optimizer"]
    policy, z = optimizer.param_groups
    assert {id(p) for p in policy["params"]} == {id(p) for p in trained.policy.parameters()}
    assert (policy["lr"], z["lr"]) == (1e-3, 1e-2)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("source", ["policy", "base"])
def test_a_detached_head_sends_no_gradient_into_the_policy(detach: bool, source: str) -> None:
    """With all response log-probs' gradient removed, what is left came through the head."""
    trained = module(head(detach=detach, source=source))
    torch.nn.init.normal_(trained.log_z.head.out.weight)  # type: ignore[union-attr]
    data = batch()
    scores = trained.policy_scores(data)
    inputs = trained.loss_inputs(data, scores.log_prob.detach())
    log_z = trained.estimate_log_z(inputs, data, scores)
    log_z.sum().backward()
    moved = [
        p for p in trained.policy.parameters() if p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert bool(moved) == (source == "policy" and not detach)


MODES: dict[str, Callable[[], LogZ]] = {
    "head": head,
    "group": GroupLogZ,
    "group_loo": GroupLooLogZ,
    "ema": partial(EmaLogZ, rate=0.1, scope="global"),
    "ema_prompt": partial(EmaLogZ, rate=0.1, scope="prompt"),
    "fixed": partial(FixedLogZ, value=0.0),
}


@pytest.mark.parametrize("mode", MODES)
def test_no_microbatch_split_changes_a_gradient_in_any_mode_of_log_z(mode: str) -> None:
    found = []
    for tokens in (10_000, 20):
        trained = module(MODES[mode](), tokens=tokens)
        step(trained, batch())
        found.append(gradients(trained))
    scale = float(found[0].abs().max())
    assert scale > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * scale)


def test_alpha_1_without_psi_and_with_group_log_z_is_the_identity() -> None:
    trained = module(GroupLogZ(), alpha=1.0, format_penalty=0.0)
    assert step(trained, batch()).item() == pytest.approx(0.0, abs=1e-10)
    assert gradients(trained).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["head", "ema"])
def test_log_z_starts_at_minus_the_mean_mismatch_of_the_first_refill(mode: str) -> None:
    trained, data = module(MODES[mode]()), batch()
    trained.calibrate(data)
    scores = trained.policy_scores(data)
    inputs = trained.loss_inputs(data, scores.log_prob)
    lengths = data.tokens.mask.sum(1)
    per_token = (data.log_p_base.sum(1) / lengths).double()
    expected = -((1 - 3.0) * per_token + 3.0 * 0.5 * (~data.formatted)).mean()
    log_z = trained.estimate_log_z(inputs, data, scores)
    torch.testing.assert_close(log_z.double(), expected.expand(12), rtol=1e-5, atol=1e-5)


def test_tb_tokens_scale_is_taken_from_the_first_refill_and_kept() -> None:
    objective = BalanceObjective(partial(tb_token_mismatch, reading="energy"), NO_WEIGHT)
    trained, data = module(GroupLogZ(), objective, calibrate={"scale": "length_mean"}), batch()
    trained.calibrate(data)
    assert trained.calibration == {"scale": data.tokens.response_lengths.float().mean().item()}
    checkpoint: dict[str, Any] = {}
    trained.on_save_checkpoint(checkpoint)
    resumed = module(GroupLogZ(), objective, calibrate={"scale": "length_mean"})
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.calibration == trained.calibration


def length_control(scope: Any) -> ChosenLength:
    return ChosenLength(
        tokens=None, factor=1.2, scope=scope, follow=0.5, rate=1.0, max_step=0.2,
        bounds=(-10.0, 10.0), max_tokens=20,
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["global", "prompt"])
def test_a_price_of_length_is_set_by_each_refill_enters_the_loss_and_is_kept(scope: str) -> None:
    objective = BalanceObjective(tb_traj_mismatch, PerToken(NO_WEIGHT))
    made = partial(module, GroupLogZ(), objective, format_penalty=-0.1)
    trained, data = made(length_control=length_control(scope)), batch()
    trained.print = lambda *_: None  # type: ignore[method-assign, assignment]
    assert trained.uses_log_p_old
    assert not made().uses_log_p_old
    trained.calibrate(data)
    first = trained.length_control.price(data.prompt_id)
    assert first is not None
    trained.price_length(data)
    price = trained.length_control.price(data.prompt_id)
    assert price is not None
    assert not torch.equal(price, first)
    assert len(price.unique()) == (1 if scope == "global" else 3)

    loss = step(trained, data)
    mask, length = data.tokens.mask, data.tokens.response_lengths
    with torch.no_grad():
        S = (trained.policy_scores(data).log_prob * mask).sum(1)
    psi = -0.1 * ~data.formatted
    u = S - 3.0 * ((data.log_p_base * mask).sum(1) + length * psi) + price * length
    residual = torch.zeros(len(u))
    for group in data.prompt_index.unique():
        rows = data.prompt_index == group
        w = 1 / length[rows] ** 2
        residual[rows] = u[rows] - (w * u[rows]).sum() / w.sum()
    torch.testing.assert_close(loss, ((residual / length) ** 2).mean())
    shown = trained.step_metrics
    assert float(shown["length_target"]) == pytest.approx(1.2 * float(length.float().mean()))
    assert {"length_price", "length_price_lead"} <= shown.keys()

    checkpoint: dict[str, Any] = {}
    trained.on_save_checkpoint(checkpoint)
    resumed = made(length_control=length_control(scope))
    resumed.on_load_checkpoint(checkpoint)
    again = resumed.length_control.price(data.prompt_id)
    assert again is not None
    assert torch.equal(again, price)
    assert resumed.length_control.metrics() == trained.length_control.metrics()


def test_a_prompt_table_is_part_of_the_state() -> None:
    trained = module(EmaLogZ(rate=0.5, scope="prompt"))
    step(trained, batch())
    resumed = module(EmaLogZ(rate=0.5, scope="prompt"))
    resumed.load_state_dict(trained.state_dict())
    assert resumed.log_z.table == trained.log_z.table  # type: ignore[union-attr]
    assert set(resumed.log_z.table) == {100, 101, 102}  # type: ignore[union-attr]


def test_rl_strategies_have_no_log_z() -> None:
    objective = PolicyGradientObjective("traj", "in_reward", "rloo", "sequence_sum", NO_WEIGHT)
    trained = module(head(), objective)
    assert list(trained.log_z.parameters()) == []
    assert float(step(trained, batch()).abs()) >= 0
    assert float(trained.step_metrics["log_z"]) == 0.0


def test_policy_and_head_are_clipped_apart_and_a_non_finite_gradient_skips_the_step() -> None:
    trained = module(head())
    optimizer = trained.configure_optimizers()["optimizer"]
    for p in trained.parameters():
        p.grad = torch.full_like(p, 3.0)
    trained.configure_gradient_clipping(optimizer)
    for part in (trained.policy, trained.log_z):
        norm = torch.stack([p.grad.norm() for p in part.parameters()]).norm()  # type: ignore[union-attr]
        assert norm.item() == pytest.approx(1.0, abs=1e-3)
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    next(trained.policy.parameters()).grad[0] = float("nan")  # type: ignore[index]
    trained.print = lambda *_: None  # type: ignore[method-assign, assignment]
    trained.configure_gradient_clipping(optimizer)
    optimizer.step()
    assert trained.skipped_steps == 1
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def unkept(data: TrajectoryBatch) -> TrajectoryBatch:
    return TrajectoryBatch(**{**vars(data), "log_p_old": torch.full_like(data.log_p_old, math.nan)})


def test_behaviour_log_probs_that_nobody_kept_change_no_gradient_of_an_unweighted_strategy() -> (
    None
):
    unweighted = BalanceObjective(la_tb_mismatch, NO_WEIGHT)
    assert not unweighted.uses_log_p_old
    known, unknown = (module(FixedLogZ(value=-0.7), objective=unweighted) for _ in range(2))
    data = batch()
    for trained in (known, unknown):
        with torch.no_grad():  # moved on since the rollouts were sampled
            trained.policy.lm_head.weight.mul_(1.05)
    without = unkept(data)
    assert torch.equal(step(known, data), step(unknown, without))
    assert torch.equal(gradients(known), gradients(unknown))
    names = {"ess", "is_log_ratio_q05", "is_log_ratio_q50", "is_log_ratio_q95"}
    assert names <= known.step_metrics.keys()
    # sampled from the very weights, as policy_version says: every ratio is 1
    assert unknown.step_metrics["ess"] == 1
    assert unknown.step_metrics["is_log_ratio_q95"] == 0
    older = TrajectoryBatch(**{**vars(without), "policy_version": data.policy_version - 1})
    unknown.training_step(older, 1)
    assert unknown.step_metrics.keys() == known.step_metrics.keys() - names
    assert all(bool(value.isfinite()) for value in unknown.step_metrics.values())
    assert unknown.step_metrics["is_weight_mean"] == 1


def test_log_z_starts_from_the_base_where_no_behaviour_log_probs_are_kept() -> None:
    known, unknown = module(), module()
    data = batch()  # of the base, which the policy still is
    known.calibrate(data)
    unknown.calibrate(unkept(data))
    states = known.log_z.state_dict(), unknown.log_z.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_pieces_of_this_package_are_known_not_to_read_behaviour_log_probs() -> None:
    def mine(inputs: Any, *, alpha: float) -> Tensor:
        return la_tb_mismatch(inputs, alpha=alpha) + inputs.log_p_old.sum(1)

    assert not BalanceObjective(la_tb_mismatch, NO_WEIGHT).uses_log_p_old
    assert not BalanceObjective(partial(la_tb_mismatch), NO_WEIGHT, token_variance).uses_log_p_old
    assert BalanceObjective(la_tb_mismatch, EQ_10).uses_log_p_old
    assert BalanceObjective(mine, NO_WEIGHT).uses_log_p_old
    assert module(FixedLogZ(value=0.0), objective=lambda *_, **__: None).uses_log_p_old


def test_a_nan_log_prob_skips_the_step() -> None:
    trained, data = module(GroupLogZ()), batch()
    data.log_p_base[0, 0] = float("nan")
    trained.print = lambda *_: None  # type: ignore[method-assign, assignment]
    assert trained.training_step(data, 0) is None
    assert trained.skipped_steps == 1


def test_the_policy_stands_still_while_the_head_warms_up() -> None:
    made = module(head(warmup_steps=3), warmup_steps=2).configure_optimizers()
    scheduler, optimizer = made["lr_scheduler"]["scheduler"], made["optimizer"]
    rates = []
    for _ in range(6):
        rates.append([round(g["lr"], 6) for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [policy for policy, _ in rates] == [0, 0, 0, 0.0005, 0.001, 0.001]
    assert {z for _, z in rates} == {0.01}


def test_alpha_schedules() -> None:
    assert [constant(4.0, p) for p in (0.0, 0.5, 1.0)] == [4.0] * 3
    line = partial(anneal, start=1.0, share=0.5)
    assert [line(4.0, p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 2.5, 4.0, 4.0]
