"""Blockwise LA-TB in the module: states between blocks, a head on them, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from powerflow_lit.config.rules import ConfigError
from powerflow_lit.flow import FlowHead
from powerflow_lit.log_z import GroupLogZ, LogZ
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.probes import allow_packing
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.objectives import (
    BalanceObjective,
    BlockVariance,
    ImportanceWeight,
    ObjectiveError,
    la_tb_mismatch,
)
from tests.tiny_models import make_tiny_model
from tests.unit.test_config import checked
from tests.unit.test_module import batch, gradients, head, module, step
from tests.unit.test_packing import RAGGED, batch_of

NO_WEIGHT = ImportanceWeight("none", None, None)
SIZE = 2


def blocks(size: int = SIZE) -> BalanceObjective:
    return BalanceObjective(la_tb_mismatch, NO_WEIGHT, BlockVariance(size))


def blockwise(
    size: int = SIZE, log_z: LogZ | None = None, *, detach: bool = True, **changes: Any
) -> PowerFlowModule:
    """A module with blocks, whose head does not start at 0."""
    trained = module(log_z or head(), blocks(size), flow=FlowHead(width=16, detach=detach),
                     **changes)  # fmt: skip
    assert trained.flow is not None
    torch.manual_seed(1)
    torch.nn.init.normal_(trained.flow.head.out.weight)
    return trained


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("qwen2")
    make_tiny_model(folder, "qwen2")
    return load_model(
        str(folder), dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [10_000, 40])
def test_states_between_blocks_are_those_of_the_prefix_alone(
    qwen2: PreTrainedModel, tokens: int, packed: bool, size: int
) -> None:
    """A prompt and the tokens before the boundary, by themselves, through the model's trunk."""
    data = batch_of(RAGGED)
    allow_packing(qwen2)
    if not packed:
        del qwen2.packed_span
    with torch.no_grad():
        found = response_scores(
            qwen2, data, tokens_per_microbatch=tokens, logit_chunk_mb=1.0, block_size=size
        ).block_states
        assert found is not None
        longest = int(data.response_lengths.max())
        assert found.shape[:2] == (len(data.lengths), max(1, (longest - 1) // size))
        inner = 0
        for row, (prompt, length) in enumerate(
            zip(data.prompt_lengths.tolist(), data.response_lengths.tolist(), strict=True)
        ):
            for k in range(found.shape[1]):
                after = (k + 1) * size
                if after >= length:
                    assert not found[row, k].any()
                    continue
                inner += 1
                ids = data.input_ids[row : row + 1, : prompt + after]
                state = qwen2.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
                torch.testing.assert_close(found[row, k], state, rtol=1e-4, atol=1e-4)
    assert inner > 5


def test_the_step_is_the_objective_on_the_heads_values_and_the_whole_response_gives_la_tb() -> None:
    data = batch()
    assert int(data.tokens.response_lengths.max()) == 7
    whole = step(module(objective=BalanceObjective(la_tb_mismatch, NO_WEIGHT)), data).item()
    assert step(blockwise(7), data).item() == pytest.approx(whole, rel=1e-6)
    trained = blockwise()
    loss = step(trained, data).item()
    scores = trained.policy_scores(data)
    inputs = trained.with_estimates(trained.loss_inputs(data, scores.log_prob), data, scores)
    assert inputs.log_flow is not None
    assert inputs.log_flow.shape == (12, 3)
    assert inputs.log_flow.std() > 0.1
    assert blocks()(inputs, alpha=3.0).loss.item() == pytest.approx(loss, rel=1e-6)
    assert loss > whole + 1e-3
    assert float(trained.step_metrics["residual_std_within"]) > 0.03


@pytest.mark.parametrize("detach", [True, False])
def test_no_microbatch_split_changes_a_gradient_of_policy_or_heads(detach: bool) -> None:
    found = []
    for tokens in (10_000, 20):
        trained = blockwise(detach=detach, tokens=tokens)
        step(trained, batch())
        assert trained.flow is not None
        of_head = [p.grad.flatten() for p in trained.flow.parameters() if p.grad is not None]
        found.append(torch.cat([gradients(trained), *of_head]))
    scale = float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("detach", [True, False])
def test_the_flow_heads_gradient_reaches_the_policy_only_if_it_is_not_detached(
    detach: bool,
) -> None:
    trained, data = blockwise(detach=detach), batch()
    scores = trained.policy_scores(data)
    assert trained.flow is not None
    assert scores.block_states is not None
    trained.flow.of_all(scores.block_states, data, SIZE).sum().backward()
    moved = [p for p in trained.policy.parameters() if p.grad is not None and p.grad.any()]
    assert bool(moved) != detach


def test_log_v_starts_at_0_and_is_trained_at_log_zs_rate() -> None:
    trained = module(head(), blocks(), flow=FlowHead(width=16, detach=True))
    data = batch()
    scores = trained.policy_scores(data)
    inputs = trained.with_estimates(trained.loss_inputs(data, scores.log_prob), data, scores)
    assert inputs.log_flow is not None
    assert not inputs.log_flow.any()
    policy, heads = trained.configure_optimizers()["optimizer"].param_groups
    assert trained.flow is not None
    own = {id(p) for head in (trained.log_z, trained.flow) for p in head.parameters()}
    assert {id(p) for p in heads["params"]} == own
    assert (policy["lr"], heads["lr"]) == (1e-3, 1e-2)
    step(trained, data)
    assert trained.flow.head.out.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_its_weights_are_in_the_checkpoint_and_come_back() -> None:
    trained = blockwise(log_z=GroupLogZ())
    names = {name.split(".")[0] for name in trained.state_dict()}
    assert names == {"policy", "flow"}
    saved: dict[str, Any] = {"state_dict": dict(trained.state_dict())}
    trained.on_save_checkpoint(saved)
    assert any(name.startswith("flow.") for name in saved["state_dict"])
    fresh = module(GroupLogZ(), blocks(), flow=FlowHead(width=16, detach=True))
    fresh.load_state_dict(saved["state_dict"])
    data = batch()
    assert step(fresh, data).item() == step(trained, data).item()


def test_with_an_adapter_only_it_and_the_heads_are_trained_and_kept() -> None:
    policy = module().policy
    add_lora(policy, LoraSettings(rank=2, lora_alpha=4.0, target_modules="all-linear"))
    trained = blockwise(policy=policy)
    step(trained, batch())
    saved: dict[str, Any] = {"state_dict": dict(trained.state_dict())}
    trained.on_save_checkpoint(saved)
    kinds = {name.split(".")[0] for name in saved["state_dict"]}
    assert kinds == {"policy", "log_z", "flow"}
    assert all("lora" in n for n in saved["state_dict"] if n.startswith("policy."))


def test_responses_shorter_than_a_block_are_trained_as_by_la_tb() -> None:
    """Then no boundary exists, but on several ranks the head must still have a gradient."""
    trained, data = blockwise(50), batch()
    step(trained, data)
    assert trained.flow is not None
    assert all(p.grad is not None and not p.grad.any() for p in trained.flow.parameters())


def test_an_objective_with_blocks_and_no_head_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"strategy\.flow"):
        module(head(), blocks())
    assert module(head(), flow=FlowHead(width=16, detach=True)).flow is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.objective.spread.block_size=0", r"block_size=0"),
        ("strategy.objective.spread.block_size=2.5", r"must be a whole number"),
        ("strategy.flow.width=0", r"strategy\.flow\.width=0"),
        ("strategy.flow=null", r"strategy=la_tb_blocks"),
    ],
)
def test_bad_settings_of_blocks_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked("strategy=la_tb_blocks", override)
