"""vLLM's weights in parts on two ranks: the responses are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.shared_engine import SharedEngine, engine_group
from powerflow_lit.types import Sampling
from tests.tiny_models import make_tiny_model
from tests.two_ranks import on_ranks

pytestmark = pytest.mark.slow
PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31], [40, 41, 42, 43]]
STRIDE = 4096  # of the seeds of two prompts


def answers(folder: str) -> dict[str, Any]:
    """Of this rank's share of the prompts; of all in one process."""
    from powerflow_lit.rollout.vllm_engine import VllmEngine

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    policy = load_model(
        folder, dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    spec = EngineSpec(policy, folder, pad_id=0, eos_ids=(2,), max_model_len=64, seed=0,
                      trust_remote_code=False)  # fmt: skip
    built = VllmEngine(spec, dtype="float32", max_num_seqs=64, kv_cache_gb=1,
                       gpu_memory_utilization=0.3, enforce_eager=True, sleep=False,
                       tensor_parallel=ranks, extra={})  # fmt: skip
    parts = sum(p.numel() for p in _model(built).parameters())
    engine: RolloutEngine = built if ranks == 1 else SharedEngine(built, engine_group(ranks))
    try:
        size = len(PROMPTS) // ranks
        own = PROMPTS[rank * size : (rank + 1) * size]
        found: dict[str, Any] = {"parameters": parts}
        for version in (1, 2):  # weights are replaced in place
            if version == 2:
                for parameter in policy.parameters():
                    parameter.data.mul_(1.1)
            engine.sync(policy_weights(policy), version)
            sampling = Sampling(4, 24, seed=7 + STRIDE * rank * size)
            found[f"responses {version}"] = [
                (c.token_ids, c.log_probs) for g in engine.generate(own, sampling) for c in g
            ]
        found["scores"] = engine.score([(prompt, [5, 6, 7]) for prompt in own])
        return found
    finally:
        engine.close()


def _model(engine: Any) -> torch.nn.Module:
    found: list[torch.nn.Module] = []
    engine._apply(found.append)
    return found[0]


def test_two_ranks_that_share_an_engine_sample_what_one_process_does(tmp_path: Path) -> None:
    folder = make_tiny_model(
        tmp_path / "model", "qwen2", hidden_size=128, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256,
    )  # fmt: skip
    one = on_ranks(answers, str(folder), world=1)[0]
    two = on_ranks(answers, str(folder))
    assert max(rank["parameters"] for rank in two) < 0.55 * one["parameters"]
    for version in (1, 2):
        name = f"responses {version}"
        union = [row for rank in two for row in rank[name]]
        assert [ids for ids, _ in union] == [ids for ids, _ in one[name]]
        for (_, ours), (_, theirs) in zip(union, one[name], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert one["responses 1"] != one["responses 2"]
    scores = [row for rank in two for row in rank["scores"]]
    for ours, theirs in zip(scores, one["scores"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
