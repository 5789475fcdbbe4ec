"""A model spread over two gloo ranks computes what it computes whole: values, gradients, steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from powerflow_lit import ranks
from powerflow_lit.checkpoints import link
from powerflow_lit.config.rules import ConfigError
from powerflow_lit.export import export
from powerflow_lit.models import logprobs
from powerflow_lit.models.base import frozen_base
from powerflow_lit.models.checkpointing import checkpoint_layers
from powerflow_lit.models.forward_pass import prompt_states
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.logprobs import Scores, guarded_responses, response_scores
from powerflow_lit.models.lora import LoraSettings, add_lora, plain_copy, policy_weights
from powerflow_lit.models.probes import allow_packing
from powerflow_lit.models.sharding import shard, whole
from powerflow_lit.optimization import adamw
from powerflow_lit.rollout.engine import check_weights
from powerflow_lit.shard_files import (
    file_of,
    read_part,
    remove_unused,
    what_is_missing,
    whole_weights,
)
from powerflow_lit.types import TokenBatch
from tests.tiny_models import Kind, make_tiny_model
from tests.two_ranks import on_ranks
from tests.unit.test_config import checked
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
    ("qwen2", "packed, pooled, blocks"),
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


def scores(policy: PreTrainedModel, batch: TokenBatch, tokens: int, how: str = "") -> Scores:
    return response_scores(
        policy,
        batch,
        tokens_per_microbatch=tokens,
        logit_chunk_mb=0.01,
        pool="mean" if "pooled" in how else None,
        block_size=3 if "blocks" in how else None,
    )


def loss_of(found: Scores) -> Tensor:
    """A sum over rows, each of which is coupled to itself alone: the ranks' losses add up."""
    loss = found.log_prob.sum(1).square().sum() / 100
    states = [x for x in (found.prompt_state, found.block_states) if x is not None]
    return loss + sum(x.square().sum() for x in states)


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
    guarded = guarded_responses(
        policy, rows, min_p=0.05, tokens_per_microbatch=BUDGET, logit_chunk_mb=0.01
    )
    found["guarded"] = [(g.log_prob, g.allowed.ids) for g in guarded]
    copied = plain_copy(policy)  # as the HF engine does, which then takes the weights one by one
    own = copied.state_dict()
    weights = policy_weights(policy)
    check_weights(weights, set(own))
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(whole(tensor))
    found["copied"] = scores(copied, rows, 10_000).log_prob.detach()
    export(policy, AutoTokenizer.from_pretrained(folder), folder / how)
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
        found = scores(policy, rows, tokens, how)
        (scale * loss_of(found)).backward()
        for part in found.deferred:
            part.backward(nullcontext)
        if number == 0:
            first = {"log_prob": found.log_prob.detach(), "gradients": gradients(policy)}
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: whole(t).clone() for n, t in policy.state_dict().items()}
    with torch.no_grad():
        after = scores(policy, rows, tokens).log_prob
    return {**first, "norm": norm, "weights": weights, "after": after}


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


def test_copies_and_exports_of_a_spread_model_are_the_policy_whole(
    models: Path, spread: list[list[dict[str, Any]]]
) -> None:
    for number, (kind, how) in enumerate(CASES):
        exported = AutoModelForCausalLM.from_pretrained(models / kind / how / "export").double()
        expected = scores(exported.eval(), batch_of(RAGGED), 10_000).log_prob.detach()
        for rank, found in enumerate(spread[number]):
            width = found["after"].shape[1]
            # merged in float32, as for every engine
            assert_near(found["copied"], found["after"], atol=1e-5 if "lora" in how else 1e-9)
            assert_near(expected[SHARES[rank], :width], found["copied"], atol=1e-9)
        assert (models / kind / how / "export" / "adapter").exists() == ("lora" in how)


def test_a_guard_allows_what_it_allows_of_a_whole_model(
    models: Path, spread: list[list[dict[str, Any]]]
) -> None:
    number = CASES.index(("llama", "padded, checkpointed"))
    policy = AutoModelForCausalLM.from_pretrained(
        models / "llama" / "padded, checkpointed" / "export"
    )
    alone = guarded_responses(
        policy.double().eval(), batch_of(RAGGED), min_p=0.05, tokens_per_microbatch=10_000,
        logit_chunk_mb=1.0,
    )  # fmt: skip
    found = [response for rank in spread[number] for response in rank["guarded"]]
    for (log_prob, ids), expected in zip(found, alone, strict=True):
        assert_near(log_prob, expected.log_prob, atol=1e-9)
        assert torch.equal(ids, expected.allowed.ids)


def test_each_rank_holds_half_of_the_weights(
    models: Path, spread: list[list[dict[str, Any]]]
) -> None:
    whole_model = policy_of(models / "llama", "llama", "")
    numbers = sum(p.numel() for p in whole_model.parameters())
    held = [found["numbers"] for found in spread[CASES.index(("llama", "padded, checkpointed"))]]
    assert sum(held) == numbers
    assert max(held) < 0.51 * numbers


# --- files --------------------------------------------------------------------------------------


def written(folder: Path, name: str = "shards-a") -> tuple[Path, dict[str, Any]]:
    """A checkpoint of three ranks, of which the last holds nothing of a tensor of two rows."""
    rows = torch.arange(10.0).view(5, 2)
    parts = [(rows[:2], rows[:1]), (rows[2:4], rows[1:2]), (rows[4:], rows[:0])]
    (folder / name).mkdir(parents=True)
    for rank, (large, small) in enumerate(parts):
        weights = {"large": large.clone(), "small": small.clone(), "whole": rows[0]}
        part = {"folder": name, "rank": rank, "spread": ["large", "small"], "state_dict": weights}
        torch.save(part, file_of(folder / name, rank))
    sizes = [file_of(folder / name, rank).stat().st_size for rank in range(3)]
    state = {"state_dict": {}, "shards": {"folder": name, "bytes": sizes}}
    torch.save(state, folder / "last.ckpt")
    return folder / "last.ckpt", state


def test_parts_are_put_together_in_the_order_of_ranks(tmp_path: Path) -> None:
    found = whole_weights(*written(tmp_path))
    rows = torch.arange(10.0).view(5, 2)
    assert torch.equal(found["large"], rows)
    assert torch.equal(found["small"], rows[:2])
    assert torch.equal(found["whole"], rows[0])


def test_a_part_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "shards-a").rename(tmp_path / "shards-b")
    with pytest.raises(ValueError, match="is of another checkpoint"):
        read_part(tmp_path / "shards-b", 0)


def test_parts_of_a_save_that_was_killed_go_with_the_next_and_named_ones_stay(
    tmp_path: Path,
) -> None:
    """The file is renamed into place when its parts are whole: before that nothing names them."""
    written(tmp_path)
    link(tmp_path / "last.ckpt", tmp_path / "good.ckpt")
    (tmp_path / "last.ckpt").unlink()
    written(tmp_path, "shards-b")
    (tmp_path / "shards-killed").mkdir()
    (tmp_path / "previous.ckpt").write_bytes(b"who knows what it named")
    remove_unused(tmp_path)
    assert (tmp_path / "shards-killed").exists()
    (tmp_path / "previous.ckpt").unlink()
    remove_unused(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("shards-*")) == ["shards-a", "shards-b"]
    assert what_is_missing(tmp_path / "good.ckpt", torch.load(tmp_path / "good.ckpt")) is None


def test_whether_merged_weights_hold_a_name_makes_no_sum(models: Path) -> None:
    """Ranks would each ask in an order of their own, and every sum is one that all make."""
    weights = policy_weights(policy_of(models / "qwen2", "qwen2", "lora"))

    def refused(name: str) -> Tensor:
        raise AssertionError(name)

    weights.__class__ = type("Unread", (type(weights),), {"__getitem__": refused})
    assert not set(weights) - weights.keys()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer=fsdp", "trainer.precision=16-mixed"], "a rank would see the infinities of its"),
        (["+trainer.strategy=fsdp"], "take trainer=fsdp"),
        (["+trainer.strategy=deepspeed_stage_3"], "take trainer=fsdp"),
    ],
)
def test_what_cannot_be_spread_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(*overrides)


def test_a_spread_model_trains_in_bfloat16_by_default() -> None:
    assert checked("trainer=fsdp").trainer["precision"] == "bf16-mixed"
    assert checked("trainer=fsdp", "trainer.accelerator=cpu").trainer["precision"] == "32-true"


# --- memory -------------------------------------------------------------------------------------

LAYERS = 8


def most_held(folder: Path) -> dict[str, float]:
    """The most that a rank holds whole in an update of three passes and more, in layers.

    Counted where FSDP makes a unit whole and where it gives it back.
    """
    policy = policy_of(folder, "llama", "checkpointed")
    layer = sum(p.numel() for p in policy.model.layers[0].parameters())
    shard(policy, init_device_mesh("cpu", (ranks.world_size(),)))
    whole_units: dict[int, int] = {}
    counts = [0]

    def count(name: str, method: Any) -> Any:
        def counted(group: Any) -> None:
            method(group)
            numbers = sum(p._orig_size.numel() for p in group.fsdp_params)
            whole_units[id(group)] = numbers if name == "_to_unsharded" else 0
            counts.append(sum(whole_units.values()))

        return counted

    for name in ("_to_unsharded", "_to_sharded"):
        setattr(FSDPParamGroup, name, count(name, getattr(FSDPParamGroup, name)))
    found = scores(policy, batch_of(RAGGED), BUDGET)
    assert len(found.deferred) >= 2
    loss_of(found).backward()
    for part in found.deferred:
        part.backward(nullcontext)
    held = {"most": max(counts) / layer, "left": counts[-1] / layer}
    with torch.no_grad():
        scores(policy, batch_of(RAGGED), BUDGET)
    held["after scoring"] = counts[-1] / layer
    counts.clear()
    logprobs.is_sharded = lambda model: False  # type: ignore[assignment]
    loss_of(scores(policy, batch_of(RAGGED), BUDGET)).backward()
    return {**held, "most within": max(counts) / layer}


def test_no_rank_holds_more_than_a_few_layers_whole(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "deep", "llama", num_hidden_layers=LAYERS)
    for found in on_ranks(most_held, folder):
        assert 1 < found["most"] < 3, found  # embeddings and output layer are as large as one here
        assert found["most within"] > LAYERS, found  # which is what `Deferred` is for
        assert found["left"] == found["after scoring"] == 0
