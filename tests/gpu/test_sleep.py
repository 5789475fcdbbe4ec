"""An engine that sleeps on a GPU gives its memory back and answers as before when it wakes."""

from __future__ import annotations

import pytest
import torch

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout import EngineError
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.types import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22]]


def test_it_sleeps_between_refills_and_answers_as_before() -> None:
    pytest.importorskip("vllm")
    from powerflow_lit.rollout.vllm_engine import VllmEngine

    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    ).cuda()
    spec = EngineSpec(policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64,
                      seed=0, trust_remote_code=False)  # fmt: skip
    engine = VllmEngine(spec, dtype="float32", max_num_seqs=64, kv_cache_gb=1,
                        gpu_memory_utilization=0.3, enforce_eager=True, sleep=True,
                        tensor_parallel=1, extra={})  # fmt: skip
    try:
        sampling = Sampling(4, 24, temperature=0.0)
        engine.sync(policy_weights(policy), 1)
        before = engine.generate(PROMPTS, sampling)
        awake = torch.cuda.mem_get_info()[0]
        engine.rest()
        assert torch.cuda.mem_get_info()[0] - awake > 2**30, "bytes that the cache and weights held"
        assert engine.policy_version == -1
        with pytest.raises(EngineError, match="before the first sync"):
            engine.generate(PROMPTS, sampling)
        engine.sync(policy_weights(policy), 2)
        after = engine.generate(PROMPTS, sampling)
        assert [[c.token_ids for c in g] for g in after] == [
            [c.token_ids for c in g] for g in before
        ]
    finally:
        engine.close()
