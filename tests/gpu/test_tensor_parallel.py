"""Engines within the ranks of a run on two GPUs: one each, or one on both, and asleep between."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout import EngineError, RolloutEngine
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.shared_engine import SharedEngine, engine_group
from powerflow_lit.types import Sampling
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31], [40, 41, 42, 43]]
STRIDE = 4096  # of the seeds of two prompts


def on_gpus(world: int, folder: str, tensor_parallel: int) -> list[dict[str, Any]]:
    """What `answers` returns on each of so many NCCL ranks."""
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(_rank, (world, meeting, folder, tensor_parallel), nprocs=world)
        return [torch.load(Path(meeting, f"{r}.pt"), weights_only=False) for r in range(world)]


def _rank(rank: int, world: int, meeting: str, folder: str, tensor_parallel: int) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(os.path.join(meeting, "store"), world)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world)
    torch.save(answers(folder, tensor_parallel), Path(meeting, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def answers(folder: str, tensor_parallel: int) -> dict[str, Any]:
    pytest.importorskip("vllm")
    from powerflow_lit.rollout.vllm_engine import VllmEngine

    ranks, rank = dist.get_world_size(), dist.get_rank()
    policy = load_model(
        folder, dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    ).cuda()
    spec = EngineSpec(policy, folder, pad_id=0, eos_ids=(2,), max_model_len=64, seed=0,
                      trust_remote_code=False)  # fmt: skip
    built = VllmEngine(spec, dtype="float32", max_num_seqs=64, kv_cache_gb=1,
                       gpu_memory_utilization=0.3, enforce_eager=True, sleep=True,
                       tensor_parallel=tensor_parallel, extra={})  # fmt: skip
    engine: RolloutEngine = built
    if tensor_parallel > 1:
        engine = SharedEngine(built, engine_group(tensor_parallel))
    size = len(PROMPTS) // ranks
    own = PROMPTS[rank * size : (rank + 1) * size]
    found: dict[str, Any] = {}
    try:
        places: list[set[torch.device]] = []
        built._apply(lambda model: places.append({p.device for p in model.parameters()}))
        found["devices"] = {str(device) for device in places[0]}
        for version in (1, 2):
            engine.sync(policy_weights(policy), version)
            sampling = Sampling(4, 24, temperature=0.0, seed=7 + STRIDE * rank * size)
            groups = engine.generate(own, sampling)
            found[f"responses {version}"] = [c.token_ids for g in groups for c in g]
            awake = torch.cuda.mem_get_info()[0]
            engine.rest()
            dist.barrier()  # both have let go
            found["freed"] = torch.cuda.mem_get_info()[0] - awake
            with pytest.raises(EngineError, match="before the first sync"):
                engine.generate(own, sampling)
    finally:
        engine.close()
    return found


def test_engines_of_two_ranks_answer_as_one_alone_and_sleep_in_between(tmp_path: Path) -> None:
    folder = str(
        make_tiny_model(
            tmp_path / "model", "qwen2", hidden_size=256, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=512,
        )
    )  # fmt: skip
    alone = on_gpus(1, folder, 1)[0]
    for tensor_parallel in (1, 2):
        two = on_gpus(2, folder, tensor_parallel)
        assert [rank["devices"] for rank in two] == [{"cuda:0"}, {"cuda:1"}]
        for version in (1, 2):
            union = [ids for rank in two for ids in rank[f"responses {version}"]]
            assert union == alone[f"responses {version}"]
        assert all(rank["freed"] > 2**30 for rank in two)
