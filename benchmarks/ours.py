"""This project's own training, held at a gate before each refill: `python -m benchmarks.ours JSON`.

The configuration is composed by Hydra and built by `assembly`, Lightning's Trainer included, as for
`training`; only evaluation, checkpoints and the console are left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from benchmarks.imposed import ImposedLengths
from benchmarks.models import EOS, shape_of, text_of
from benchmarks.turns import Gate
from benchmarks.workloads import Workload
from powerflow_lit.assembly import build_datamodule, build_module, build_policy, build_trainer
from powerflow_lit.callbacks import StepMetrics
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.metrics_csv import MetricsCsv
from powerflow_lit.tasks.base import Task
from powerflow_lit.types import Prompt

PHASES = ("rollout", "score", "update", "sync")


class WorkloadTask(Task):
    """The prompts of a workload; evaluation is never asked for."""

    name, headline = "workload", "length_mean"

    def __init__(self, workload: Workload, vocabulary: int) -> None:
        texts = map(text_of, workload.prompt_ids(vocabulary))
        self._prompts = [Prompt(i, text) for i, text in enumerate(texts)]

    def train_prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._prompts


def config_of(
    workload: Workload, model: str, *, engine: str, threads: int, overrides: Sequence[str]
) -> TrainConfig:
    """The training configuration that the workload amounts to.

    Args:
        overrides: Hydra's, last; as a user would type them.
    """
    fixed = [
        "model=hf",
        f"model.path={model}",
        "model.name=benchmark",
        "model.prompt_route=plain",
        "model.engine_dtype=float32",
        f"model.threads={threads}",
        "model.memory_check=false",
        "alpha=2",
        f"rollout={engine}",
        f"rollout.prompts_per_refill={workload.prompts}",
        f"rollout.samples_per_prompt={workload.rollouts}",
        f"rollout.max_new_tokens={workload.max_new_tokens}",
        f"rollout.max_prompt_tokens={workload.max_prompt_tokens}",
        f"buffer.updates_per_refill={workload.updates}",
        "monitor=none",
        "logger=none",
        "refills=100000",
        "run_dir=unused",
    ]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return train_config(compose("train", [*fixed, *overrides]))


class AtTheGate(L.Callback):
    """Holds each refill until it is told to go, and reports what the last one took."""

    def __init__(self, gate: Gate, clock: PhaseClock, lengths: ImposedLengths) -> None:
        self.gate, self.clock, self.lengths = gate, clock, lengths
        self.seen = dict.fromkeys(PHASES, 0.0)

    def hold(self, tokens: int) -> None:
        """Called right before a refill; `tokens` of response were generated so far."""
        now = {name: self.clock.total[name] for name in PHASES}
        for name in PHASES:
            self.gate.add(name, now[name] - self.seen[name])
        self.seen = now
        device_gb = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        self.lengths.restart(self.gate.wait(tokens_so_far=tokens, device_gb=device_gb))


def trained(
    settings: Mapping[str, Any], workload: Workload, folder: Path
) -> tuple[L.Trainer, Any, Any, AtTheGate]:
    """Trainer, module, data module and gate of a run in `folder`."""
    config = config_of(
        workload, settings["model"], engine=settings["engine"], threads=settings["threads"],
        overrides=settings.get("overrides", ()),
    )  # fmt: skip
    L.seed_everything(config.seed, verbose=False)
    vocabulary = shape_of(workload.shape).vocabulary
    lengths = ImposedLengths(workload.lengths_by_prompt(vocabulary))
    if settings["engine"] == "vllm":
        # the hook lies in vLLM: the first import of it must be the engine's, under its settings
        imposing = lengths.install_in_vllm
    else:
        lengths.install_in_transformers(EOS)
        imposing = None
    clock = PhaseClock()
    policy, tokenizer = build_policy(config)
    module = build_module(config, policy, instantiate(config.strategy.objective))
    data = build_datamodule(config, WorkloadTask(workload, vocabulary), tokenizer, clock)
    gate = AtTheGate(Gate(), clock, lengths)
    _hold_before_refills(data, gate, imposing)
    loggers = [MetricsCsv(folder, keep_until=None)]
    trainer = build_trainer(config, folder, [StepMetrics(clock)], loggers)
    return trainer, module, data, gate


def _hold_before_refills(data: Any, gate: AtTheGate, imposing: Any) -> None:
    refill = data.refill

    def held(index: int) -> None:
        if imposing is not None and index == 0:
            _ = data.engine  # imports vLLM
            imposing()
        gate.hold(data.tokens_generated)
        refill(index)

    data.refill = held


def main() -> None:
    settings = json.loads(sys.argv[1])
    workload = Workload(**settings["workload"])
    with tempfile.TemporaryDirectory() as folder:
        trainer, module, data, _ = trained(settings, workload, Path(folder))
        trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main()
