"""Run in a process of its own: what a real vLLM engine changes in it, as lines of text.

Prints one line for each difference in what the trainer relies on, after the engine was built, has
generated, and was closed, first without a process group of the trainer's and then with one; and
`done` at the end.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.vllm_engine import VllmEngine
from powerflow_lit.types import Sampling

State = dict[str, Any]


def state() -> State:
    """All that is compared, by name."""
    kind, keys, *rest = np.random.get_state()
    found: State = {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": (kind, keys.tolist(), *rest),  # type: ignore[union-attr]
        "python random state": random.getstate(),
        "torch threads": torch.get_num_threads(),
        "torch inter-op threads": torch.get_num_interop_threads(),
        "set_num_threads": torch.set_num_threads,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
        "excepthook": sys.excepthook,
        "working folder": os.getcwd(),
        "CPU affinity": os.sched_getaffinity(0),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "destroy_process_group": dist.destroy_process_group,
    }
    handled = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    found |= {f"handler of {number!r}": signal.getsignal(number) for number in handled}
    return found | {f"environment {name}": value for name, value in os.environ.items()}


def told(when: str, before: State, *, without: tuple[str, ...] = ()) -> None:
    """A line for each difference."""
    after = state()
    for name in sorted(before.keys() | after.keys()):
        same = name in before and name in after and before[name] == after[name]
        if not same and not name.startswith(without):
            values = [str(s.get(name, "unset"))[:60] for s in (before, after)]
            print(f"{when}: {name}: {values[0]} -> {values[1]}")


def group_works(group: Any) -> None:
    """The trainer's group is the one it was, and still reduces."""
    assert dist.is_initialized(), "the process group is gone"
    assert dist.group.WORLD is group, "the process group is another"
    total = torch.tensor([3.0])
    dist.all_reduce(total)
    assert total.item() == 3.0


def engine_life(when: str, check_group: Callable[[], None]) -> None:
    """Build, sync, generate, score, close; told after each."""
    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    spec = EngineSpec(
        policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64, seed=0,
        trust_remote_code=False,
    )  # fmt: skip
    before = state()
    engine = VllmEngine(
        spec, dtype="float32", max_num_seqs=64, kv_cache_gb=1, gpu_memory_utilization=0.3,
        enforce_eager=True, sleep=False, tensor_parallel=1,
        extra={},
    )  # fmt: skip
    # vLLM's own settings are meant to stay
    ours = ("environment VLLM_",)
    told(f"{when}, built", before, without=ours)
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1, "set_num_threads works"
    torch.set_num_threads(before["torch threads"])
    check_group()
    engine.sync(policy_weights(policy), 0)
    told(f"{when}, synced", before, without=ours)
    (group,) = engine.generate([[10, 11, 12]], Sampling(4, 24, seed=3))
    assert all(c.token_ids for c in group)
    assert engine.score([([10, 11], [12, 13])])
    told(f"{when}, used", before, without=ours)
    check_group()
    engine.close()
    told(f"{when}, closed", before, without=ours)
    check_group()


def main() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, lambda *_: None)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)  # type: ignore[operator]
    engine_life("no group", lambda: None)
    assert not dist.is_initialized(), "a process group was left behind"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    engine_life("own group", lambda: group_works(group))
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    main()
