"""The HF engine draws each response from a seed of its own, and from the right distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.engine import EngineSpec, seed_from
from powerflow_lit.rollout.hf_engine import DrawFromSeeds, HfEngine
from powerflow_lit.rollout.metrics import pooled
from powerflow_lit.types import Sampling


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    count = 20_000
    draw = DrawFromSeeds(range(count), torch.device("cpu"))
    drawn = draw(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    found = torch.bincount(drawn, minlength=5) / count
    expected = logits.softmax(-1)
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4 * sigma).all()
    again = draw(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    independent = float((expected**2).sum())  # of the next token by the same seed's generator
    agree = float((drawn == again).float().mean())
    assert agree == pytest.approx(independent, abs=4 * (0.25 / count) ** 0.5)


@pytest.fixture(scope="module")
def engine() -> HfEngine:
    policy: PreTrainedModel = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    spec = EngineSpec(
        policy, "embedded:tiny", pad_id=0, eos_ids=(2,), max_model_len=64, seed=0,
        trust_remote_code=False,
    )  # fmt: skip
    made = HfEngine(spec, sequences_per_batch=5, tokens_per_microbatch=4096, logit_chunk_mb=1.0)
    made.sync(policy_weights(policy), 0)
    return made


def test_a_part_of_the_prompts_has_the_same_responses_by_itself(engine: HfEngine) -> None:
    prompts = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33], [20, 21, 22]]
    whole = engine.generate(prompts, Sampling(3, 12, seed=3))
    part = engine.generate(prompts[2:], Sampling(3, 12, seed=seed_from(3, 2)))
    tokens = [[[c.token_ids for c in group] for group in found] for found in (whole, part)]
    assert tokens[0][2:] == tokens[1]
    assert tokens[0][1] != tokens[0][3]  # the same prompt in another place


def test_sampling_leaves_the_global_random_state_alone(engine: HfEngine) -> None:
    before = torch.get_rng_state()
    engine.generate([[10, 11]], Sampling(2, 4, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_what_ranks_found_is_weighted_by_their_tokens_and_the_largest_gap_stays() -> None:
    one = {"selfcheck/engine_logp_gap": 0.5, "rollout/guard_removed_mass": 0.1}
    other = {"selfcheck/engine_logp_gap": 0.2, "rollout/guard_removed_mass": 0.4}
    assert pooled([(one, 10), (other, 30)]) == {
        "selfcheck/engine_logp_gap": 0.5,
        "rollout/guard_removed_mass": pytest.approx(0.325),
    }
