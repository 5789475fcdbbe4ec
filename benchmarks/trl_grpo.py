"""TRL's GRPOTrainer, held at a gate before each refill: `python -m benchmarks.trl_grpo JSON`.

Its settings are the fastest that do the same work as ours: see `arguments_of`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.imposed import ImposedLengths
from benchmarks.models import EOS, shape_of, text_of
from benchmarks.turns import Gate
from benchmarks.workloads import Workload

LEARNING_RATE = 1.0e-6  # conf/model/hf.yaml
KV_CACHE_GB = 1  # conf/rollout/vllm.yaml
BATCHED_TOKENS = 8192  # of our engine on the CPU


def arguments_of(workload: Workload, folder: str, *, vllm: bool) -> dict[str, Any]:
    """Keyword arguments of GRPOConfig; each with its reason."""
    update = workload.trajectories // workload.updates
    return {
        # the same refill: so many rollouts a prompt, dealt out over so many updates, each once
        "per_device_train_batch_size": update,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": workload.updates,
        "num_generations": workload.rollouts,
        "num_iterations": 1,
        "max_completion_length": workload.max_new_tokens,
        # the same sampling: the whole distribution
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        # a reference model is scored, as our base is
        "beta": 0.04,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        # float32 throughout (TRL's default is bf16), nothing recomputed (its default is to)
        "bf16": False,
        "gradient_checkpointing": False,
        # no work beside training
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_completions": False,
        "shuffle_dataset": False,  # every refill holds all prompts anyway
        "use_cpu": not torch.cuda.is_available(),
        "use_vllm": vllm,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": False,
        # one context for both engines; the pass for old log-probs is made with or without the
        # correction, because two updates share a generation, so that leaving it out saves nothing
        "vllm_max_model_length": workload.max_prompt_tokens + workload.max_new_tokens + 1,
        "max_steps": 10**6,
        "output_dir": folder,
        # transformers' default, the fused AdamW, is the fastest
    }


def no_preference(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within a group, so that there is a gradient."""
    return [float(i % 2) for i in range(len(completions))]


def trainer_of(settings: Mapping[str, Any], workload: Workload, folder: str, gate: Gate) -> Any:
    """The GRPOTrainer with its phases timed; what it does is unchanged."""
    vllm = settings["engine"] == "vllm"
    vocabulary = shape_of(workload.shape).vocabulary
    lengths = ImposedLengths(workload.lengths_by_prompt(vocabulary))
    if vllm:
        from benchmarks.trl_on_cpu import patch

        if not torch.cuda.is_available():
            patch(kv_cache_gb=KV_CACHE_GB, max_num_batched_tokens=BATCHED_TOKENS, dtype="float32")
        lengths.install_in_vllm()
    else:
        lengths.install_in_transformers(EOS)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):  # type: ignore[misc]
        """Waits at the gate before it generates, and times its phases."""

        tokens = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            lengths.restart(gate.wait(tokens_so_far=self.tokens))
            begun = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            gate.add("score", time.perf_counter() - begun - gate.seconds("rollout", "sync"))
            self.tokens += int(made["completion_mask"].sum())
            return made

        def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
            begun, synced = time.perf_counter(), gate.seconds("sync")
            made = super()._generate_single_turn(*args, **options)
            now = time.perf_counter() - begun
            gate.add("rollout", now - (gate.seconds("sync") - synced))
            return made

        def training_step(self, *args: Any, **options: Any) -> Any:
            begun, refill = time.perf_counter(), gate.begun
            loss = super().training_step(*args, **options)
            if gate.begun != refill:  # it has waited and generated within
                begun = gate.begun + gate.seconds("rollout", "score", "sync")
            gate.add("update", time.perf_counter() - begun)
            return loss

    prompts = [text_of(ids) for ids in workload.prompt_ids(vocabulary)]
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.float32, attn_implementation="sdpa"
        ),
        args=GRPOConfig(**arguments_of(workload, folder, vllm=vllm)),
        reward_funcs=no_preference,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    if vllm:
        sync = trainer.vllm_generation.sync_weights

        def timed_sync() -> None:
            with gate.phase("sync"):
                sync()

        trainer.vllm_generation.sync_weights = timed_sync
    _time_optimizer(trainer, gate)
    return trainer


def _time_optimizer(trainer: Any, gate: Gate) -> None:
    """The optimizer's step is outside of `training_step`; it belongs to the update."""
    create = trainer.create_optimizer

    def created(*args: Any, **options: Any) -> Any:
        optimizer = create(*args, **options)
        step = optimizer.step

        def timed_step(*args: Any, **options: Any) -> Any:
            with gate.phase("update"):
                return step(*args, **options)

        optimizer.step = timed_step
        return optimizer

    trainer.create_optimizer = created


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    gate = Gate()
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(settings, Workload(**settings["workload"]), folder, gate).train()


if __name__ == "__main__":
    main()
