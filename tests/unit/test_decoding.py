"""Staged decoding gives what a loop without a cache gives, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.decoding import ROOM, GrowingLayer, row_cache
from powerflow_lit.rollout.engine import SEED_STRIDE, EngineSpec
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.types import Sampling
from tests.tiny_models import Kind, make_tiny_model

PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50], [60, 61, 62]]
SEED, SAMPLES, LIMIT = 11, 4, 40
PAD = 0


@torch.no_grad()
def plainly(model: Any, prompt: list[int], seed: int, eos: set[int], *, draws: bool) -> list[int]:
    """One response by whole forward passes of one row: no cache, no padding, no batch."""
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    while len(ids) < len(prompt) + LIMIT and not (len(ids) > len(prompt) and ids[-1] in eos):
        logits = model(torch.tensor([ids])).logits[0, -1]
        if draws:
            logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gemma3_text", "phi"])
def engine_and_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HfEngine, Any, set[int]]:
    """An engine whose random model ends a response early now and then."""
    kind: Kind = request.param
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / kind, kind)
    model = load_model(
        str(folder), dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    eos = set(range(100, 116))  # of 261 tokens: responses of about 16 tokens
    spec = EngineSpec(
        model, kind, pad_id=PAD, eos_ids=tuple(eos), max_model_len=64, seed=0,
        trust_remote_code=False,
    )  # fmt: skip
    engine = HfEngine(spec, sequences_per_batch=7, tokens_per_microbatch=4096, logit_chunk_mb=1.0)
    engine.sync(policy_weights(model), 0)
    return engine, model, eos


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_response_is_that_of_a_row_by_itself_without_a_cache(
    engine_and_model: tuple[HfEngine, Any, set[int]], temperature: float
) -> None:
    engine, model, eos = engine_and_model
    sampling = Sampling(SAMPLES, LIMIT, temperature=temperature, seed=SEED, log_probs=0)
    found = engine.generate(PROMPTS, sampling)
    for index, (prompt, group) in enumerate(zip(PROMPTS, found, strict=True)):
        for sample, completion in enumerate(group):
            seed = SEED + SEED_STRIDE * index + sample
            wanted = plainly(model, prompt, seed, eos, draws=temperature > 0)
            assert list(completion.token_ids) == wanted
            assert completion.truncated == (wanted[-1] not in eos)
    lengths = {len(c.token_ids) for group in found for c in group}
    assert temperature == 0 or len(lengths) > 4  # so that rows left the batch on the way


def test_a_prompts_own_limit_ends_its_rows(
    engine_and_model: tuple[HfEngine, Any, set[int]],
) -> None:
    engine, _, _ = engine_and_model
    whole = engine.generate(PROMPTS, Sampling(SAMPLES, LIMIT, seed=SEED, log_probs=0))
    limits = [3, 30, 1]
    cut = engine.generate(
        PROMPTS, Sampling(SAMPLES, LIMIT, seed=SEED, log_probs=0), max_new_tokens=limits
    )
    for limit, long, short in zip(limits, whole, cut, strict=True):
        assert [c.token_ids for c in short] == [c.token_ids[:limit] for c in long]


def test_a_models_own_ways_of_decoding_have_no_say(
    engine_and_model: tuple[HfEngine, Any, set[int]],
) -> None:
    engine, model, eos = engine_and_model
    spec = EngineSpec(
        model, "bent", pad_id=PAD, eos_ids=tuple(eos), max_model_len=64, seed=0,
        trust_remote_code=False,
    )  # fmt: skip
    before, model.generation_config = (
        model.generation_config,
        GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=2, min_new_tokens=30),
    )
    bent = HfEngine(spec, sequences_per_batch=7, tokens_per_microbatch=4096, logit_chunk_mb=1.0)
    model.generation_config = before
    bent.sync(policy_weights(model), 0)
    sampling = Sampling(SAMPLES, LIMIT, seed=SEED, log_probs=0)
    found = [e.generate(PROMPTS, sampling) for e in (engine, bent)]
    tokens = [[[c.token_ids for c in group] for group in made] for made in found]
    assert tokens[0] == tokens[1]


def test_a_growing_layer_holds_what_transformers_own_does_through_choices_and_cuts() -> None:
    own, growing = DynamicLayer(), GrowingLayer()
    generator = torch.Generator().manual_seed(0)

    def more(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        first, second = torch.randn(2, rows, 3, tokens, 4, generator=generator)
        return first, second

    def both(keys: Tensor, values: Tensor) -> None:
        for a, b in zip(own.update(keys, values), growing.update(keys, values), strict=True):
            assert torch.equal(a, b)
        assert own.get_seq_length() == growing.get_seq_length()

    both(*more(2, 5))
    for layer in (own, growing):
        layer.batch_select_indices(torch.tensor([0, 0, 1, 1, 1]))
    for _ in range(ROOM + 3):  # past the first buffer
        both(*more(5, 1))
    for layer in (own, growing):
        layer.batch_select_indices(torch.tensor([4, 1]))
    both(*more(2, 1))
    for layer in (own, growing):
        layer.crop(-2)
    both(*more(2, 1))
    for layer in (own, growing):
        layer.reset()
    both(*more(1, 2))


def test_states_of_other_kinds_keep_generates_own_cache() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    model = MambaForCausalLM(config)
    assert row_cache(model) is None
    spec = EngineSpec(
        model, "mamba", pad_id=PAD, eos_ids=(1,), max_model_len=16, seed=0, trust_remote_code=False
    )  # fmt: skip
    engine = HfEngine(spec, sequences_per_batch=8, tokens_per_microbatch=64, logit_chunk_mb=1.0)
    engine.sync(model.state_dict(), 0)
    found = engine.generate([[3, 4], [5, 6]], Sampling(2, 6, seed=SEED, log_probs=0))
    for index, group in enumerate(found):
        for sample, completion in enumerate(group):
            ids = [[3, 4], [5, 6]][index]
            seed = SEED + SEED_STRIDE * index + sample
            generator = torch.Generator().manual_seed(seed)
            made: list[int] = []
            with torch.no_grad():
                while len(made) < 6 and (not made or made[-1] != 1):
                    logits = model(torch.tensor([ids + made]), use_cache=False).logits[0, -1]
                    noise = torch.empty_like(logits).exponential_(generator=generator).log()
                    made.append(int((logits - noise).argmax()))
            assert list(completion.token_ids) == made
