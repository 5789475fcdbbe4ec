"""The real engines: agreement, weight sync, reproducibility, and what they leave alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout import EngineError, RolloutEngine
from powerflow_lit.rollout.engine import EngineSpec, NonFiniteRolloutError, NonFiniteWeightsError
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.types import Sampling

PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33]]
SAMPLING = Sampling(samples_per_prompt=4, max_new_tokens=24, seed=3)


def vllm_engine(policy: PreTrainedModel, path: Path | str) -> RolloutEngine:
    from powerflow_lit.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        spec(policy, path), dtype="float32", max_num_seqs=64, kv_cache_gb=1,
        gpu_memory_utilization=0.3, enforce_eager=True, sleep=False, tensor_parallel=1,
        extra={},
    )  # fmt: skip


def vllm_server(policy: PreTrainedModel, path: Path | str) -> RolloutEngine:
    from powerflow_lit.rollout.vllm_server import VllmServerEngine

    return VllmServerEngine(
        spec(policy, path), addresses=[], servers=1, devices=[], dtype="float32", max_num_seqs=64,
        kv_cache_gb=1, gpu_memory_utilization=0.3, enforce_eager=True, extra={},
        weight_transfer="disk", weights_dir=None, start_s=300, request_s=60, wait_for_server_s=1,
    )  # fmt: skip


def hf_engine(policy: PreTrainedModel, path: Path | str) -> RolloutEngine:
    return HfEngine(
        spec(policy, path), sequences_per_batch=64, tokens_per_microbatch=4096, logit_chunk_mb=1.0
    )


def spec(policy: PreTrainedModel, path: Path | str) -> EngineSpec:
    return EngineSpec(
        policy, str(path), pad_id=0, eos_ids=(2,), max_model_len=64, seed=0, trust_remote_code=False
    )


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, and two processes lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    params=[
        "vllm",
        "hf",
        pytest.param("vllm_server", marks=pytest.mark.faults),
    ]  # its start is slow
)
def engine(request: pytest.FixtureRequest, policy: PreTrainedModel) -> Iterator[RolloutEngine]:
    make = {"vllm": vllm_engine, "hf": hf_engine, "vllm_server": vllm_server}[request.param]
    built = make(policy, folder_of("tiny"))
    yield built
    built.close()
    built.close()  # closing twice is safe


def own_log_probs(
    model: PreTrainedModel, prompt: list[int], response: tuple[int, ...]
) -> list[float]:
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    rows = range(len(prompt) - 1, ids.shape[1] - 1)
    return [float(log_probs[row, token]) for row, token in zip(rows, response, strict=True)]


def test_the_contract_of_an_engine(
    engine: RolloutEngine, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="before the first sync"):
        engine.generate(PROMPTS, SAMPLING)
    weights = policy_weights(policy)
    engine.sync(weights, 5)
    assert engine.policy_version == 5

    # log-probs are the model's own at temperature 1, whatever the temperature of sampling
    for temperature in (1.0, 0.5, 0.0):
        sampling = Sampling(2, 24, temperature=temperature, seed=1)
        for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
            for completion in group:
                expected = own_log_probs(policy, prompt, completion.token_ids)
                assert completion.log_probs == pytest.approx(expected, abs=1e-4)
                assert engine.score([(prompt, completion.token_ids)])[0] == pytest.approx(
                    expected, abs=1e-4
                )
                ended = completion.token_ids[-1] == 2
                assert ended != completion.truncated
                assert ended or len(completion.token_ids) == 24

    # each prompt may have a limit of its own, within one call
    limited = engine.generate([PROMPTS[0]] * 3, SAMPLING, max_new_tokens=[1, 4, 24])
    for group, limit in zip(limited, (1, 4, 24), strict=True):
        for completion in group:
            assert len(completion.token_ids) == len(completion.log_probs) <= limit
            assert completion.truncated == (completion.token_ids[-1] != 2)
    assert [max(len(c.token_ids) for c in group) for group in limited] == [1, 4, 24]

    # the same seed gives the same tokens, another seed others; samples of a prompt differ
    first, again = engine.generate(PROMPTS, SAMPLING), engine.generate(PROMPTS, SAMPLING)
    assert first == again
    other = engine.generate(PROMPTS, Sampling(4, 24, seed=4))
    assert [c.token_ids for g in first for c in g] != [c.token_ids for g in other for c in g]
    assert len({c.token_ids for c in first[0]}) > 1
    same_prompt = engine.generate([PROMPTS[0], PROMPTS[0]], SAMPLING)
    assert {c.token_ids for c in same_prompt[0]} != {c.token_ids for c in same_prompt[1]}

    # log-probs are given to the first prompts, as many as are asked for, and change no token
    for sampling in (SAMPLING, replace(SAMPLING, temperature=0.0)):
        with_all = engine.generate(PROMPTS, sampling)
        for asked in (0, 1, 3):
            found = engine.generate(PROMPTS, replace(sampling, log_probs=asked))
            for number, (group, whole) in enumerate(zip(found, with_all, strict=True)):
                expected = [c if number < asked else replace(c, log_probs=()) for c in whole]
                assert group == expected

    # each prompt is handed over when all of its responses are there, before those of longer ones
    events: list[Any] = []
    groups = engine.generate(
        PROMPTS, SAMPLING, lambda done, _: events.append(done), max_new_tokens=[24, 1, 24],
        on_finished=lambda number, group: events.append((number, group)),
    )  # fmt: skip
    handed = [event for event in events if isinstance(event, tuple)]
    assert sorted(handed, key=lambda event: event[0]) == list(enumerate(groups))
    if engine.name == "vllm":  # generate keeps a batch to its end
        short, long = events.index((1, groups[1])), events.index((0, groups[0]))
        assert any(isinstance(event, int) for event in events[short:long])

    # a partial, foreign or non-finite set of weights never reaches the engine
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(EngineError, match=f"missing.*{name}"):
        engine.sync({k: v for k, v in weights.items() if k != name}, 6)
    with pytest.raises(EngineError, match="unknown"):
        engine.sync({**weights, "extra.weight": torch.zeros(1)}, 6)
    with pytest.raises(NonFiniteWeightsError, match=f"{name} holds NaN"):
        engine.sync({**weights, name: torch.full_like(weights[name], float("nan"))}, 6)
    assert engine.policy_version == 5
    assert engine.generate(PROMPTS, SAMPLING) == first
    assert all(math.isfinite(x) for group in first for c in group for x in c.log_probs)

    # new weights change what it says, at once (no stale prefix cache)
    changed = {k: v * (1.3 if "layers.1" in k else 1.0) for k, v in weights.items()}
    engine.sync(changed, 6)
    moved = LlamaForCausalLM(policy.config).eval()
    moved.load_state_dict(changed)
    completion = engine.generate(PROMPTS, SAMPLING)[0][0]
    expected = own_log_probs(moved, PROMPTS[0], completion.token_ids)
    assert completion.log_probs == pytest.approx(expected, abs=1e-4)

    # logits that are no numbers are found also where nobody asks for log-probs
    for module in ("hf_engine", "vllm_engine", "vllm_server"):
        monkeypatch.setattr(f"powerflow_lit.rollout.{module}.check_weights", lambda *_: None)
    engine.sync({**weights, name: torch.full_like(weights[name], math.nan)}, 7)
    with pytest.raises(NonFiniteRolloutError, match="NaN or inf"):
        engine.generate(PROMPTS, replace(SAMPLING, log_probs=0))


def test_a_tied_output_layer_is_synced_too_whatever_the_number_of_threads(tmp_path: Path) -> None:
    """vLLM's kernels keep the number of threads of their first call; the trainer's may change."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=128,
        tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = vllm_engine(model, tmp_path)
    try:
        for version in range(3):
            torch.set_num_threads(1 + version % 2)
            engine.sync(policy_weights(model), version)
            for completion in engine.generate(PROMPTS, SAMPLING)[0]:
                expected = own_log_probs(model, PROMPTS[0], completion.token_ids)
                assert completion.log_probs == pytest.approx(expected, abs=1e-4)
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.5)
    finally:
        engine.close()


@pytest.mark.faults
def test_the_trainer_is_as_it_was_while_vllm_works_and_after() -> None:
    """Its process group too: closing an engine destroys it unless that is prevented."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.faults.trainer_state"],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line for line in ran.stdout.splitlines() if ": " in line and " -> " in line]
    assert lines == []
    assert ran.stdout.splitlines()[-1] == "done"
