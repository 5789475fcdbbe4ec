"""What is trained and in which precision: adapters, the frozen base, checkpointing, 16 bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from powerflow_lit.models.base import AdapterOffBase, CopiedBase, frozen_base, round_weights
from powerflow_lit.models.checkpointing import checkpoint_layers, without_dropout
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import (
    LoraSettings,
    add_lora,
    is_lora,
    lora_layers,
    plain_copy,
    policy_weights,
)
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.precision import WeightsInHalf, with_half_precision
from powerflow_lit.types import TokenBatch
from tests.tiny_models import DENSE, Kind, make_tiny_model
from tests.unit.test_module import batch, gradients, head, module, step

ALL = LoraSettings(rank=4, lora_alpha=8.0, target_modules="all-linear")
ROWS = [([5, 9, 40, 77], [3, 200, 61, 7, 90, 12]), ([8, 8, 1], [44, 120])]
LARGE = 10**9  # a token budget that nothing exceeds


def load(folder: Path, kind: Kind, **changes: Any) -> PreTrainedModel:
    path = make_tiny_model(folder / kind, kind, **changes)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def with_adapter(model: PreTrainedModel, settings: LoraSettings = ALL) -> PreTrainedModel:
    """A model whose adapter does something."""
    torch.manual_seed(3)
    add_lora(model, settings)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


def score(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        rows = TokenBatch.collate(ROWS, pad_id=0)
        return response_scores(model, rows, tokens_per_microbatch=LARGE, logit_chunk_mb=1).log_prob


@pytest.mark.parametrize("kind", DENSE)
def test_merged_weights_have_a_plain_models_names_and_the_policys_log_probs(
    tmp_path: Path, kind: Kind
) -> None:
    plain = load(tmp_path, kind)
    names, before = set(plain.state_dict()), score(plain)
    policy = with_adapter(copy.deepcopy(plain))
    assert (score(policy) - before).abs().max() > 0.05
    merged = policy_weights(policy)
    assert set(merged) == names
    plain.load_state_dict(dict(merged))
    torch.testing.assert_close(score(plain), score(policy), rtol=0, atol=1e-4)
    copied = plain_copy(policy)
    assert not is_lora(copied)
    assert set(copied.state_dict()) == names
    assert torch.equal(score(copied), score(plain))


def test_a_merged_weight_is_w_plus_scaled_b_a_in_float32(tmp_path: Path) -> None:
    policy = load(tmp_path, "qwen2")
    round_weights(policy, torch.bfloat16)
    with_adapter(policy)
    layer = lora_layers(policy)["model.layers.1.mlp.up_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32, "an adapter is float32 on frozen bfloat16 weights"
    exact = layer.get_base_layer().weight.double() + 2.0 * (b.double() @ a.double())
    merged = policy_weights(policy)["model.layers.1.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    nearest = exact.to(torch.bfloat16)
    assert (merged == nearest).float().mean() > 0.999, "rounded once, at the end"


def test_a_fresh_adapter_leaves_the_policy_at_its_base_to_the_bit(tmp_path: Path) -> None:
    policy = load(tmp_path, "qwen2")
    before = score(policy)
    add_lora(policy, ALL)
    assert torch.equal(score(policy), before)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert "lm_head.lora_A.default.weight" not in trained


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("nothing",)])
def test_an_adapter_where_none_can_be_is_refused(tmp_path: Path, targets: tuple[str]) -> None:
    policy = load(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"finetune\.target_modules"):
        add_lora(policy, LoraSettings(4, 8.0, targets))


def test_the_base_of_an_adapted_policy_is_the_policy_with_the_adapter_off(tmp_path: Path) -> None:
    policy = load(tmp_path, "qwen2")
    before = score(policy)
    base = frozen_base(with_adapter(policy), None)
    assert isinstance(base, AdapterOffBase)
    moved = score(policy)
    with base.model() as model:
        assert model is policy
        assert torch.equal(score(model), before)
    assert torch.equal(score(policy), moved)
    with pytest.raises(ZeroDivisionError), base.model():
        raise ZeroDivisionError  # on again after an error too
    assert torch.equal(score(policy), moved)
    assert any(p.requires_grad for p in policy.parameters())


def test_a_base_copy_in_bfloat16_rounds_weights_but_no_rotary_frequency(tmp_path: Path) -> None:
    policy = load(tmp_path, "qwen2")
    base = frozen_base(policy, torch.bfloat16)
    assert isinstance(base, CopiedBase)
    assert {p.dtype for p in base.copy.parameters()} == {torch.bfloat16}
    assert policy.dtype == torch.float32
    ours, theirs = policy.model.rotary_emb.inv_freq, base.copy.model.rotary_emb.inv_freq
    assert torch.equal(ours, theirs)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2", dtype=torch.bfloat16)
    assert torch.equal(score(base.copy), score(reloaded.eval()))


def adapted_module(**changes: Any) -> PowerFlowModule:
    policy = module().policy
    torch.manual_seed(5)
    add_lora(policy, ALL)
    return module(**{"policy": policy, **changes})


def test_only_the_adapter_and_the_head_are_trained_and_kept() -> None:
    trained = adapted_module()
    policy, z = trained.configure_optimizers()["optimizer"].param_groups
    adapter = {id(p) for n, p in trained.policy.named_parameters() if "lora_" in n}
    assert {id(p) for p in policy["params"]} == adapter
    assert {id(p) for p in z["params"]} == {id(p) for p in trained.log_z.parameters()}
    checkpoint: dict[str, Any] = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    kept = checkpoint["state_dict"]
    assert sum(v.numel() for k, v in kept.items() if k.startswith("policy.")) == sum(
        p.numel() for p in trained.policy.parameters() if p.requires_grad
    )
    resumed = adapted_module()
    for parameter in resumed.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(kept, strict=resumed.strict_loading)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in trained.state_dict().items())


@pytest.mark.parametrize("saved_adapted", [True, False])
def test_a_checkpoint_of_another_kind_of_fine_tuning_is_refused(saved_adapted: bool) -> None:
    made, other = (adapted_module(), module())[:: 1 if saved_adapted else -1]
    checkpoint: dict[str, Any] = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(checkpoint)
    with pytest.raises(ModelError, match="not of this model and finetune="):
        other.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("source", ["policy", "base"])
def test_gradients_reach_every_part_of_an_adapter_and_no_frozen_weight(source: str) -> None:
    trained = adapted_module(log_z=head(source=source))
    for layer in lora_layers(trained.policy).values():  # else B = 0 keeps A's gradient at zero
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    step(trained, batch())
    for name, parameter in trained.policy.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


# --- gradient checkpointing ----------------------------------------------------------------------


def runs_of_layers(model: PreTrainedModel) -> dict[str, int]:
    """Counts how often each layer starts from now on; a recomputation need not come to its end."""
    counts: dict[str, int] = {}
    for name, part in model.named_modules():
        if name.endswith("input_layernorm"):
            counts[name] = 0

            def count(*_: Any, name: str = name) -> None:
                counts[name] += 1

            part.register_forward_pre_hook(count)
    return counts


def gradient(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    rows = TokenBatch.collate(ROWS, pad_id=0)
    log_prob = response_scores(model, rows, tokens_per_microbatch=LARGE, logit_chunk_mb=1).log_prob
    (log_prob.sum(1) ** 2).mean().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return log_prob.detach(), torch.cat(found)


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ("qwen2", {"attention_dropout": 0.5}),
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("gemma2", {}),
    ],
)
def test_checkpointing_computes_layers_twice_and_changes_no_gradient(
    tmp_path: Path, kind: Kind, dropout: dict[str, float]
) -> None:
    model = load(tmp_path, kind, **dropout)
    expected_scores, expected = gradient(model)
    assert expected.abs().max() > 0.1
    checkpoint_layers(model)
    counts = runs_of_layers(model)
    scores, found = gradient(model)
    assert len(counts) == 2
    assert set(counts.values()) == {2}, "once forward, once more for the backward pass"
    assert torch.equal(scores, expected_scores)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    model.train()  # as Lightning does at the start of fit
    without_dropout(model)
    assert torch.equal(gradient(model)[0], expected_scores)
    assert set(counts.values()) == {4}


def test_checkpointing_also_trains_an_adapter_under_split_microbatches(tmp_path: Path) -> None:
    model = with_adapter(load(tmp_path, "qwen2"))
    _, expected = gradient(model)
    checkpoint_layers(model)
    model.zero_grad()
    rows = TokenBatch.collate(ROWS, pad_id=0)
    log_prob = response_scores(model, rows, tokens_per_microbatch=1, logit_chunk_mb=1).log_prob
    (log_prob.sum(1) ** 2).mean().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_copies_of_a_checkpointed_policy_are_plain(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen2")
    checkpoint_layers(model)
    copied = plain_copy(model)
    assert not any(m.training for m in copied.modules())


# --- 16 bits -------------------------------------------------------------------------------------


def test_bf16_true_rounds_the_weights_alone() -> None:
    trained = module(head())
    plugin = with_half_precision({"precision": "bf16-true"})["plugins"][0]
    assert isinstance(plugin, WeightsInHalf)
    plugin.convert_module(trained)
    assert {p.dtype for p in trained.policy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained.log_z.parameters()} == {torch.float32}
    assert trained.policy.model.rotary_emb.inv_freq.dtype == torch.float32
    data = batch()
    assert plugin.convert_input(data) is data
    adapted = adapted_module()
    plugin.convert_module(adapted)
    kinds = {("lora_" in n, p.dtype) for n, p in adapted.policy.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("how", ["mixed", "weights"])
def test_in_16_bits_log_probs_log_z_and_the_loss_are_float32(how: str) -> None:
    trained, data = module(head()), batch()
    nn.init.normal_(trained.log_z.head.out.weight)  # type: ignore[union-attr]
    if how == "weights":
        WeightsInHalf("bf16-true").convert_module(trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "mixed"):
        scores = trained.policy_scores(data)
        inputs = trained.loss_inputs(data, scores.log_prob)
        log_z = trained.estimate_log_z(inputs, data, scores)
        inputs = replace(inputs, log_z=log_z)
        output = trained.objective(inputs, alpha=3.0)
        output.loss.backward()
    tensors = (scores.log_prob, log_z, output.residual, output.loss)
    assert {t.dtype for t in tensors} == {torch.float32}
    # a bfloat16 value has no digits beyond its eighth bit
    assert not torch.equal(log_z, log_z.bfloat16().float())
    given = {k: v for k, v in vars(inputs).items() if v is not None}
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in given.items()}
    exact = trained.objective(type(inputs)(**wide), alpha=3.0).loss
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert gradients(trained).isfinite().all()


def test_experts_carry_no_adapter_and_the_refusal_says_what_does(tmp_path: Path) -> None:
    mixture = load(tmp_path, "qwen3_moe")
    with pytest.raises(ModelError, match=r"cannot carry an adapter.*q_proj,k_proj"):
        add_lora(mixture, LoraSettings(rank=2, lora_alpha=2, target_modules="all-linear"))
    attention = LoraSettings(rank=2, lora_alpha=2, target_modules=("q_proj", "v_proj"))
    add_lora(load(tmp_path / "again", "qwen3_moe"), attention)
