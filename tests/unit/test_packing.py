"""Packed rows: no padding, each prompt once, and the same log-probs and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel

from powerflow_lit.models import packed_attention
from powerflow_lit.models.checkpointing import checkpoint_layers
from powerflow_lit.models.forward_pass import PackedPass, forward_passes, packs, prompt_states
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.logprobs import guarded_responses, response_scores
from powerflow_lit.models.lora import LoraSettings, add_lora, plain_copy
from powerflow_lit.models.packed_attention import PackingError
from powerflow_lit.models.packing import pack, packed_microbatches
from powerflow_lit.models.probes import allow_packing
from powerflow_lit.types import TokenBatch
from tests.tiny_models import Kind, make_tiny_model

PACKABLE: tuple[Kind, ...] = ("qwen2", "llama", "gpt_neox", "gemma", "gemma3_text", "phi")
WHOLE = 10_000  # tokens; one pass
Groups = list[tuple[int, list[int]]]  # tokens of each prompt, and of its responses
RAGGED: Groups = [(5, [4, 9, 1, 4]), (12, [2, 30, 1]), (5, [8]), (3, [7, 7, 7])]


def batch_of(groups: Groups, vocabulary: int = 250, seed: int = 0) -> TokenBatch:
    """Responses dealt in turn, so that a prompt's do not stand side by side."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, vocabulary, (10_000,), generator=generator).tolist()
    rows = []
    for prompt, responses in groups:
        ids, drawn = drawn[:prompt], drawn[prompt:]
        for response in responses:
            rows.append((ids, drawn[:response]))
            drawn = drawn[response:]
    return TokenBatch.collate(rows[::2] + rows[1::2], pad_id=0)


def tiny(folder: Path, kind: Kind, attention: str = "sdpa") -> PreTrainedModel:
    return load_model(
        str(make_tiny_model(folder / kind, kind)), dtype="float32",
        attn_implementation=attention, trust_remote_code=False,
    )  # fmt: skip


def log_probs(model: PreTrainedModel, batch: TokenBatch, tokens: int = WHOLE) -> Tensor:
    return response_scores(model, batch, tokens_per_microbatch=tokens, logit_chunk_mb=1.0).log_prob


def gradient(model: PreTrainedModel, batch: TokenBatch, tokens: int = WHOLE) -> Tensor:
    """Of a loss that couples all rows."""
    model.zero_grad()
    total = log_probs(model, batch, tokens).sum(1)
    ((total - total.mean()) ** 2).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model, padded and packed."""
    padded = tiny(tmp_path_factory.mktemp("qwen2"), "qwen2")
    packed = copy.deepcopy(padded)
    allow_packing(packed)
    return padded, packed


@pytest.mark.parametrize("kind", PACKABLE)
def test_log_probs_and_gradients_are_those_of_single_rows_in_float64(
    kind: Kind, tmp_path: Path
) -> None:
    model, batch = tiny(tmp_path, kind), batch_of(RAGGED)
    exact = copy.deepcopy(model).double()
    allow_packing(model)
    losses = []
    for ids, p, r in zip(
        batch.input_ids, batch.prompt_lengths, batch.response_lengths, strict=True
    ):
        logits = exact(input_ids=ids[None, : p + r]).logits[0].log_softmax(-1)
        losses.append(logits[p - 1 : p + r - 1].gather(1, ids[p : p + r, None])[:, 0])
    found = log_probs(model, batch)
    for row, expected in zip(found, losses, strict=True):
        torch.testing.assert_close(row[: len(expected)].double(), expected, rtol=1e-5, atol=1e-5)
    total = torch.stack([row.sum() for row in losses])
    ((total - total.mean()) ** 2).mean().backward()
    reference = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    own = gradient(model, batch).double()
    assert float((own - reference).abs().max() / reference.abs().max()) < 1e-5


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 20), min_size=1, max_size=5)),
        min_size=1, max_size=5,
    ),
    tokens=st.integers(1, 200),
)  # fmt: skip
def test_any_groups_in_any_split_have_the_padded_log_probs(
    groups: Groups, tokens: int, qwen2: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    padded, packed = qwen2
    batch = batch_of(groups, seed=tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            log_probs(packed, batch, tokens), log_probs(padded, batch), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("tokens", [WHOLE, 60, 20, 1])
def test_loss_and_gradient_agree_to_1e_6_with_and_without_packing(
    tokens: int, qwen2: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    batch = batch_of(RAGGED)
    plain, packed = gradient(qwen2[0], batch), gradient(qwen2[1], batch, tokens)
    assert float(plain.norm()) > 0.1
    assert float((plain - packed).norm() / plain.norm()) < 1e-6
    losses = [log_probs(m, batch, tokens).sum(1).square().mean() for m in qwen2]
    assert float((losses[0] - losses[1]).abs() / losses[0]) < 1e-6


def test_a_pass_holds_each_prompt_once_and_no_padding() -> None:
    batch = batch_of(RAGGED)
    packed = pack(batch, range(len(batch.input_ids)))
    # a response's last token predicts nothing
    useful = sum(p + sum(r - 1 for r in responses) for p, responses in RAGGED)
    assert packed.input_ids.shape == (1, useful)
    assert len(packed.targets) == sum(sum(responses) for _, responses in RAGGED)
    assert sum(packed.layout.pieces) == useful
    assert packed.layout.longest <= 12 + 29


def test_microbatches_keep_to_the_budget_and_tear_no_prompt_that_fits() -> None:
    groups: Groups = [(10, [5, 5, 5]), (10, [5, 5, 5]), (10, [90]), (4, [20] * 6)]
    batch = batch_of(groups)
    parts = packed_microbatches(batch, 60)
    assert sorted(row for part in parts for row in part) == list(range(len(batch.input_ids)))
    sizes = [pack(batch, part).input_ids.shape[1] for part in parts]
    assert sizes == [44, 99, 4 + 2 * 19, 4 + 2 * 19, 4 + 2 * 19]


def test_all_but_the_last_microbatch_are_computed_twice(
    qwen2: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    batch, model = batch_of(RAGGED), qwen2[1]
    passes = len(forward_passes(model, batch, 30))
    assert passes > 2
    calls: list[int] = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        gradient(model, batch, 30)
        assert len(calls) == passes + passes - 1
        calls.clear()
        gradient(model, batch)
        assert len(calls) == 1
    finally:
        hook.remove()


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_prompt_states_are_those_of_the_prompts_alone(
    pool: str, qwen2: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    batch = batch_of(RAGGED)
    with torch.no_grad():
        for tokens in (WHOLE, 20):
            packed = response_scores(
                qwen2[1], batch, tokens_per_microbatch=tokens, logit_chunk_mb=1.0, pool=pool
            )  # type: ignore[arg-type]
            alone = prompt_states(qwen2[0], batch, pool)  # type: ignore[arg-type]
            assert packed.prompt_state is not None
            torch.testing.assert_close(packed.prompt_state, alone, rtol=1e-4, atol=1e-5)


def test_a_guard_allows_the_same_tokens(qwen2: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    batch = batch_of(RAGGED)
    padded, packed = (
        guarded_responses(m, batch, min_p=0.5, tokens_per_microbatch=50, logit_chunk_mb=0.01)
        for m in qwen2
    )
    for one, two in zip(padded, packed, strict=True):
        assert torch.equal(one.allowed.ids, two.allowed.ids)
        torch.testing.assert_close(one.log_prob, two.log_prob, rtol=1e-5, atol=1e-5)
    guarded = TokenBatch(
        batch.input_ids, batch.prompt_lengths, batch.response_lengths,
        tuple(g.allowed for g in padded),
    )  # fmt: skip
    with torch.no_grad():
        for row, found in zip(log_probs(qwen2[1], guarded, 50), padded, strict=True):
            torch.testing.assert_close(
                row[: len(found.log_prob)], found.log_prob, rtol=1e-5, atol=1e-5
            )


def test_checkpointed_layers_have_the_same_gradient(
    qwen2: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    batch, model = batch_of(RAGGED), copy.deepcopy(qwen2[1])
    expected = gradient(model, batch)
    checkpoint_layers(model)
    for tokens in (WHOLE, 40):
        found = gradient(model, batch, tokens)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_an_adapter_and_the_base_without_it_are_packed_too(tmp_path: Path) -> None:
    model, batch = tiny(tmp_path, "llama"), batch_of(RAGGED)
    allow_packing(model)
    add_lora(model, LoraSettings(rank=2, lora_alpha=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    copied = plain_copy(model)
    with torch.no_grad():
        torch.testing.assert_close(
            log_probs(model, batch), log_probs(copied, batch), rtol=1e-4, atol=1e-4
        )
    assert all(isinstance(p, PackedPass) for p in forward_passes(copied, batch, WHOLE))


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_bf16_mixed_precision_is_packed_too(
    as_on_a_gpu: bool,
    qwen2: tuple[PreTrainedModel, PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the mask is an object that torch dispatches on before autocast has its turn."""
    if as_on_a_gpu:
        monkeypatch.setattr(
            packed_attention, "_lower_right", lambda q, k, device: causal_lower_right(q, k)
        )
    batch = batch_of(RAGGED)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        padded, packed = (log_probs(model, batch) for model in qwen2)
    assert float((padded - packed).abs().max()) < 0.1
    assert float((padded - log_probs(qwen2[0], batch)).abs().max()) > 0


def test_what_an_architecture_does_not_allow_stays_padded(tmp_path: Path) -> None:
    gemma2 = tiny(tmp_path, "gemma2", "eager")  # a soft cap within its attention
    with pytest.raises(PackingError, match="eager"):
        allow_packing(gemma2)
    assert not packs(gemma2, 1)


def test_rows_beyond_a_sliding_window_are_padded(tmp_path: Path) -> None:
    model = tiny(tmp_path, "gemma3_text")
    model.config.sliding_window = 24
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 24 if layer.self_attn.is_sliding else None
    model.config.layer_types = ["sliding_attention"] * len(model.config.layer_types)
    allow_packing(model)
    short, long = batch_of([(5, [4, 9]), (7, [12])]), batch_of([(5, [4, 30])])
    assert isinstance(forward_passes(model, short, WHOLE)[0], PackedPass)
    assert not isinstance(forward_passes(model, long, WHOLE)[0], PackedPass)
