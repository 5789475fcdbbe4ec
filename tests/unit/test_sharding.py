"""A model spread over two gloo ranks computes what it computes whole: values, gradients, steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from powerflow_lit import ranks
from powerflow_lit.models.base import frozen_base
from powerflow_lit.models.checkpointing import checkpoint_layers
from powerflow_lit.models.forward_pass import prompt_states
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.logprobs import Scores, response_scores
from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.probes import allow_packing
from powerflow_lit.models.sharding import shard, whole
from powerflow_lit.optimization import adamw
from powerflow_lit.types import TokenBatch
from tests.tiny_models import Kind, make_tiny_model
from tests.two_ranks import on_ranks
from tests.unit.test_packing import RAGGED, batch_of

LORA = LoraSettings(rank=2, lora_alpha=4.0, target_modules="all-linear")
# each rank's rows: the second has a fifth of the tokens, and so makes fewer passes of its own
SHARES = (slice(0, 8), slice(8, 11))
BUDGET = 40  # tokens a pass


# of these, RMSNorm alone rounds to float32 whatever the model is, and only where rows share tokens
CASES: list[tuple[Kind, str]] = [
    ("phi", "packed, tied"),  # its output layer has a bias
    ("phi", "packed, tied, lora, checkpointed"),
    ("llama", "padded, checkpointed"),
    ("qwen2", "packed, pooled"),
]


def policy_of(folder: Path, kind: Kind, how: str) -> PreTrainedModel:
    policy = load_model(
        str(folder), dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    if "packed" in how:
        allow_packing(policy)
    if "lora" in how:
        torch.manual_seed(0)
        add_lora(policy, LORA)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if "checkpointed" in how:
        checkpoint_layers(policy)
    # AdamW makes whole steps of gradients that are rounding alone, as those of a key's bias are
    return policy.double()


def scores(policy: PreTrainedModel, batch: TokenBatch, tokens: int, pool: Any = None) -> Scores:
    return response_scores(
        policy, batch, tokens_per_microbatch=tokens, logit_chunk_mb=0.01, pool=pool
    )


def loss_of(found: Scores) -> Tensor:
    """A sum over rows, each of which is coupled to itself alone: the ranks' losses add up."""
    loss = found.log_prob.sum(1).square().sum() / 100
    return loss if found.prompt_state is None else loss + found.prompt_state.square().sum()


def gradients(policy: PreTrainedModel) -> dict[str, Tensor]:
    return {n: whole(p.grad).clone() for n, p in policy.named_parameters() if p.grad is not None}


def step_alone(folder: Path, kind: Kind, how: str) -> dict[str, Any]:
    """Gradients, their norm and weights after two clipped steps of AdamW, in one process."""
    return _steps(policy_of(folder, kind, how), batch_of(RAGGED), 10_000, how)


def step_spread(folder: Path, kind: Kind, how: str) -> dict[str, Any]:
    """The same on this rank's share of the rows; the loss is scaled, since ranks are averaged."""
    policy = policy_of(folder, kind, how)
    base = frozen_base(policy, torch.float64)
    mesh = init_device_mesh("cpu", (ranks.world_size(),))
    shard(policy, mesh)
    base.shard(mesh)
    batch = batch_of(RAGGED)
    rows = batch.rows(torch.arange(len(batch.lengths))[SHARES[ranks.rank()]])
    found = _steps(policy, rows, BUDGET, how, scale=ranks.world_size())
    with torch.no_grad(), base.model() as model:
        found["base"] = scores(model, rows, BUDGET).log_prob
        found["base_states"] = prompt_states(model, rows, "last")
    found["numbers"] = sum(p.to_local().numel() for p in policy.parameters())
    return found


def _steps(
    policy: PreTrainedModel, rows: TokenBatch, tokens: int, how: str, scale: int = 1
) -> dict[str, Any]:
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = adamw(
        [{"params": trained, "lr": 1e-2}], betas=(0.9, 0.95), fused=None, scaled_loss=False
    )
    for number in range(2):
        found = scores(policy, rows, tokens, "mean" if "pooled" in how else None)
        (scale * loss_of(found)).backward()
        for part in found.deferred:
            part.backward(nullcontext)
        if number == 0:
            first = {"log_prob": found.log_prob.detach(), "gradients": gradients(policy)}
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: whole(t).clone() for n, t in policy.state_dict().items()}
    return {**first, "norm": norm, "weights": weights}


def all_cases(folder: Path) -> list[dict[str, Any]]:
    return [step_spread(folder / kind, kind, how) for kind, how in CASES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in {kind for kind, _ in CASES}:
        make_tiny_model(folder / kind, kind, tie_word_embeddings=kind in ("phi", "qwen2"))
    return folder


@pytest.fixture(scope="module")
def spread(models: Path) -> list[list[dict[str, Any]]]:
    """What each rank found, case by case."""
    return list(zip(*on_ranks(all_cases, models), strict=True))


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=lambda c: str(c))
def test_a_spread_model_takes_the_steps_of_a_whole_one(
    models: Path, spread: list[list[dict[str, Any]]], number: int, case: tuple[Kind, str]
) -> None:
    alone = step_alone(models / case[0], *case)
    for rank, found in enumerate(spread[number]):
        rows = alone["log_prob"][SHARES[rank]]
        width = found["log_prob"].shape[1]
        torch.testing.assert_close(found["log_prob"], rows[:, :width], rtol=0, atol=1e-10)
        assert found["gradients"].keys() == alone["gradients"].keys()
        if case[0] == "qwen2":
            for name, gradient in alone["gradients"].items():
                assert_near(found["gradients"][name], gradient, atol=1e-6, name=name)
            continue
        assert_near(found["norm"], alone["norm"], atol=1e-9)
        for part in ("gradients", "weights"):
            for name, tensor in alone[part].items():
                assert_near(found[part][name], tensor, atol=1e-9, name=name)


def assert_near(actual: Tensor, expected: Tensor, *, atol: float, name: str = "") -> None:
    gap = float((actual - expected).abs().max())
    assert gap <= atol * max(1.0, float(expected.abs().max())), (name, gap)


def test_the_base_is_spread_too_and_stays_what_it_was(
    models: Path, spread: list[list[dict[str, Any]]]
) -> None:
    batch = batch_of(RAGGED)
    for number, case in enumerate(CASES):
        start = policy_of(models / case[0], case[0], case[1].replace("lora", ""))
        with torch.no_grad():
            expected = scores(start, batch, 10_000).log_prob
            states = prompt_states(start, batch, "last")
        for rank, found in enumerate(spread[number]):
            width = found["base"].shape[1]
            assert_near(found["base"], expected[SHARES[rank], :width], atol=1e-9)
            assert_near(found["base_states"], states[SHARES[rank]], atol=1e-5)


def test_each_rank_holds_half_of_the_weights(
    models: Path, spread: list[list[dict[str, Any]]]
) -> None:
    whole_model = policy_of(models / "llama", "llama", "")
    numbers = sum(p.numel() for p in whole_model.parameters())
    held = [found["numbers"] for found in spread[CASES.index(("llama", "padded, checkpointed"))]]
    assert sum(held) == numbers
    assert max(held) < 0.51 * numbers
