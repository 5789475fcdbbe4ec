"""Weights from the trainer's GPU to a server's on another, through vLLM's own transfer."""

from __future__ import annotations

import pytest
import torch

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.engine import EngineSpec, LostWeightsError
from powerflow_lit.rollout.rebuilding import RebuildingEngine
from powerflow_lit.rollout.vllm_server import VllmServerEngine
from powerflow_lit.rollout.vllm_server_weights import NcclTransfer
from powerflow_lit.types import Sampling
from tests.faults.faulty_train import servers_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22]]
GREEDY = Sampling(2, 24, temperature=0.0)


def test_weights_go_from_gpu_to_gpu_and_again_to_a_server_that_was_killed() -> None:
    import os
    import signal

    pytest.importorskip("vllm")
    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    ).to("cuda:0")
    spec = EngineSpec(policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64,
                      seed=0, trust_remote_code=False)  # fmt: skip
    server = VllmServerEngine(
        spec, addresses=[], servers=1, devices=[1], dtype="float32", max_num_seqs=64,
        kv_cache_gb=1, gpu_memory_utilization=0.3, enforce_eager=True, extra={},
        weight_transfer="nccl", weights_dir=None, start_s=600, request_s=120,
        wait_for_server_s=60,
    )  # fmt: skip
    told: list[str] = []
    engine = RebuildingEngine(
        lambda: server, policy=lambda: (policy_weights(policy), 2), on_rebuild=told.append
    )
    try:
        assert isinstance(server._transfer, NcclTransfer)
        for version in range(3):  # the group of the first is used again
            engine.sync(policy_weights(policy), version)
            for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
                for completion in group:
                    ids = torch.tensor([[*prompt, *completion.token_ids]], device="cuda:0")
                    with torch.no_grad():
                        log_probs = policy(input_ids=ids).logits[0].log_softmax(-1)
                    rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
                    ours = log_probs[rows, ids[0, len(prompt) :]].tolist()
                    assert completion.log_probs == pytest.approx(ours, abs=1e-3)
            if version < 2:
                with torch.no_grad():
                    for weight in policy.parameters():
                        weight.mul_(1.05)
        before = engine.generate(PROMPTS, GREEDY)
        for pid in servers_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(LostWeightsError):  # they are not kept
            engine.generate_as_it_is(PROMPTS, GREEDY, None)
        assert [[c.token_ids for c in g] for g in engine.generate(PROMPTS, GREEDY)] == [
            [c.token_ids for c in g] for g in before
        ]
        assert "is given its weights again" in told[0]
    finally:
        engine.close()
