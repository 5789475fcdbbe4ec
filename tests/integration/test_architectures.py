"""Models of several architectures, by folder: vLLM samples from what the trainer holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from powerflow_lit.models.loading import load_model, load_tokenizer
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.probes import check_output_layer
from powerflow_lit.models.prompting import encode_prompts
from powerflow_lit.rollout import EngineError, RolloutEngine
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.vllm_engine import VllmEngine
from powerflow_lit.types import Completion, Prompt, Sampling, TokenBatch
from tests.tiny_models import Kind, make_tiny_model

TOLERANCE = 1e-4  # nats a token, float32
PROMPTS = [
    Prompt(0, "What is 6 times 7?"),
    Prompt(1, "Say \\boxed{4} — ja, so."),
    Prompt(2, ""),
]


def load(folder: Path, kind: Kind) -> PreTrainedModel:
    attention = "eager" if kind == "gemma2" else "sdpa"  # only eager bounds attention scores
    return load_model(
        str(folder), dtype="float32", attn_implementation=attention, trust_remote_code=False
    )


def engine_of(policy: PreTrainedModel, folder: Path, pad_id: int, eos_id: int) -> RolloutEngine:
    spec = EngineSpec(
        policy, str(folder), pad_id=pad_id, eos_ids=(eos_id,), max_model_len=128, seed=0,
        trust_remote_code=False,
    )  # fmt: skip
    return VllmEngine(
        spec, dtype="float32", max_num_seqs=32, kv_cache_gb=1, gpu_memory_utilization=0.3,
        enforce_eager=True, sleep=False, tensor_parallel=1,
        extra={},
    )  # fmt: skip


def trainer_scores(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], groups: list[list[Completion]]
) -> list[list[float]]:
    rows = [(p, c.token_ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    with torch.no_grad():
        scores = response_scores(
            model, TokenBatch.collate(rows, 0), tokens_per_microbatch=256, logit_chunk_mb=0.02
        ).log_prob
    return [row[: len(r)].tolist() for row, (_, r) in zip(scores, rows, strict=True)]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "gemma", "gemma2"])
def test_engine_and_trainer_hold_the_same_model(kind: Kind, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / kind, kind)
    policy = load(folder, kind)
    check_output_layer(policy)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    prompts = list(encode_prompts(tokenizer, PROMPTS, "chat").values())
    probe = [(1, 2)], [[Completion((3, 4, 5), (), False)]]
    before = trainer_scores(policy, *probe)
    engine = engine_of(policy, folder, tokenizer.pad_token_id, tokenizer.eos_token_id)
    try:
        texts = []
        for version in range(3):
            weights = policy_weights(policy)
            engine.sync(weights, version)
            groups = engine.generate(prompts, Sampling(4, 24, seed=7))
            ours = trainer_scores(policy, prompts, groups)
            sampled = [c for group in groups for c in group]
            for completion, own in zip(sampled, ours, strict=True):
                assert completion.log_probs == pytest.approx(own, abs=TOLERANCE)
            rows = [(p, c.token_ids) for p, g in zip(prompts, groups, strict=True) for c in g]
            for found, own in zip(engine.score(rows), ours, strict=True):
                assert found == pytest.approx(own, abs=TOLERANCE)
            texts.append([c.token_ids for c in sampled])
            assert len(set(texts[-1])) > len(sampled) // 2, "samples differ"
            if version == 0:  # what the engine did to the process has not reached the trainer
                again = trainer_scores(policy, [(1, 2)], [[Completion((3, 4, 5), (), False)]])
                assert again == before
                fresh = load(folder, kind)
                assert (
                    trainer_scores(fresh, [(1, 2)], [[Completion((3, 4, 5), (), False)]]) == again
                )
            moved(policy, seed=version)
        assert texts[0] != texts[1] != texts[2], "new weights say other things"
        with pytest.raises(EngineError, match="missing"):
            engine.sync(dict(list(weights.items())[1:]), 9)
    finally:
        engine.close()


@torch.no_grad()
def moved(model: PreTrainedModel, seed: int) -> None:
    """Every parameter a little elsewhere, so that one that is not synced shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.2 * parameter.std() * noise)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("phi", r"output layer's bias of PhiForCausalLM.*rollout=hf"),
     ("qwen3_moe", r"experts of Qwen3MoeForCausalLM.*rollout=hf")],
)  # fmt: skip
def test_a_model_that_vllm_would_hold_wrongly_is_refused(
    kind: Kind, message: str, tmp_path: Path
) -> None:
    if kind == "qwen3_moe" and torch.cuda.is_available():
        pytest.skip("the CPU's fault alone")
    folder = make_tiny_model(tmp_path, kind)
    with pytest.raises(EngineError, match=message):
        engine_of(load(folder, kind), folder, 0, 1)
