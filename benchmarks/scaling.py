"""The tables of docs/scaling.md: what fits where, and how long a refill would take.

python -m benchmarks.scaling                     # Qwen2.5 1.5B to 72B and Llama 3.1 70B on H100s
python -m benchmarks.scaling --device a100 --models qwen2.5_7b --devices 1 2 4

Nothing is run: for each model and number of devices the settings below are tried by the formulas
of docs/scaling.md, and of those that fit the fastest is shown.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from transformers import AutoConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.devices import GIB, Device, planned_device, speeds_of
from powerflow_lit.memory_check import workload
from powerflow_lit.models.architecture import Architecture, architecture
from powerflow_lit.models.memory import engine_room, estimate
from powerflow_lit.models.planning import Speeds, plan
from powerflow_lit.models.workload import Spread, Workload

ARCHITECTURES = Path(__file__).parent / "architectures"
MODELS = ("qwen2.5_1.5b", "qwen2.5_7b", "qwen2.5_32b", "llama3.1_70b", "qwen2.5_72b")
DEVICES = (1, 2, 4, 8, 16, 32, 64)
PER_MACHINE = 8
# one workload for all: the paper's recipe with twice its prompts, which 64 devices can share
RECIPE = ("experiment=paper/qwen2.5_math_7b_reasoning", "rollout.prompts_per_refill=256",
          "rollout.engine.sleep=true")  # fmt: skip
FINETUNE = {
    "full": ("finetune=full",),
    "lora": ("finetune=lora", "model.dtype=bfloat16"),
}
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # rollout.engine.gpu_memory_utilization
TENSOR_PARALLEL = (1, 2, 4, 8)  # rollout.engine.tensor_parallel
BUDGETS = (16384, 8192, 4096)  # tokens_per_microbatch


@dataclass(frozen=True)
class Choice:
    """One way to run, and what it needs of each device."""

    trainer: str
    tensor_parallel: int
    share: float
    budget: int
    needed: int  # bytes
    seconds: float  # of a refill

    def __str__(self) -> str:
        shared = f" t={self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        fewer = f" B={self.budget}" if self.budget != BUDGETS[0] else ""
        return (
            f"{self.trainer}{shared} u={self.share:g}{fewer}: "
            f"{self.needed / GIB:.0f} GiB, {self.seconds:,.0f} s"
        )


def configured(device: str, finetune: str) -> TrainConfig:
    """The configuration that the workload is read from; the model's folder is not opened."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        asked = [*RECIPE, *FINETUNE[finetune], f"device={device}"]
        return train_config(compose("train", overrides=asked))


def sizes_of(model: str, work: Workload) -> Architecture:
    known = json.loads((ARCHITECTURES / f"{model}.json").read_text())
    config = AutoConfig.for_model(known.pop("model_type"), **known)
    return architecture(config, work.lora, trust_remote_code=False)


def spread(work: Workload, devices: int, *, sharded: bool) -> Workload:
    """The workload of one device, on so many."""
    return replace(
        work,
        groups_per_refill=math.ceil(work.groups_per_refill / devices),
        groups_per_update=math.ceil(work.groups_per_update / devices),
        spread=Spread(
            devices=devices,
            per_machine=min(devices, PER_MACHINE),
            shards=devices if sharded else 1,
            bucketed=False,  # conf/trainer/ddp.yaml: gradient_as_bucket_view
        ),
    )


def choices(
    sizes: Architecture, work: Workload, on: Device, speeds: Speeds, devices: int
) -> Iterator[Choice]:
    """All settings that fit."""
    for sharded in (False, True) if devices > 1 else (False,):
        trainer = "gpu" if devices == 1 else "fsdp" if sharded else "ddp"
        here = spread(work, devices, sharded=sharded)
        for ranks, share, budget in product(TENSOR_PARALLEL, SHARES, BUDGETS):
            if ranks > min(devices, PER_MACHINE) or sizes.heads % ranks:
                continue
            engine = replace(here.engine, tensor_parallel=ranks, share_bytes=int(share * on.total))
            tried = replace(here, engine=engine, tokens_per_microbatch=budget)
            needed, room = estimate(sizes, tried).total, engine_room(sizes, tried)
            if needed <= on.free and (room or 0) >= tried.longest_row:
                seconds = plan(sizes, tried, speeds).seconds
                yield Choice(trainer, ranks, share, budget, needed, seconds)


def table(device: str, finetune: str, models: Sequence[str], devices: Sequence[int]) -> list[str]:
    """A Markdown table: a row for each number of devices, a column for each model."""
    config = configured(device, finetune)
    on, speeds = planned_device(config.device), speeds_of(config.device)
    if on is None or speeds is None:
        raise SystemExit(f"error: --device {device}: its memory and speeds are not known")
    work = workload(config, on)
    lines = [f"| devices | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    sizes = {model: sizes_of(model, work) for model in models}
    for count in devices:
        cells = []
        for model in models:
            fitting = choices(sizes[model], work, on, speeds, count)
            best = min(fitting, key=lambda choice: choice.seconds, default=None)
            cells.append("does not fit" if best is None else str(best))
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def shapes(models: Sequence[str], device: str) -> list[str]:
    """What is known of the architectures, from their config.json."""
    work = workload(configured(device, "full"), Device("", 0, 0, is_gpu=True))
    lines = ["| model | P | h | l | heads | key heads | f | V | m |", "|---|" + "---|" * 8]
    for model in models:
        s = sizes_of(model, work)
        lines.append(
            f"| {model} | {s.parameters / 1e9:.2f}B | {s.hidden} | {s.layers} | {s.heads} | "
            f"{s.key_value_heads} | {s.feed_forward} | {s.vocabulary} | {s.multiplied / 1e9:.2f}B |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="h100", help="a name of conf/device/")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--devices", nargs="+", type=int, default=DEVICES)
    asked = parser.parse_args()
    print("\n".join(shapes(asked.models, asked.device)))
    for finetune in FINETUNE:
        print(f"\n{finetune}:\n")
        print("\n".join(table(asked.device, finetune, asked.models, asked.devices)))


if __name__ == "__main__":
    main()
