"""The peak of a real run's resident memory, against what model.estimate_only=true says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from powerflow_lit.devices import Device
from powerflow_lit.memory_check import workload
from powerflow_lit.models.architecture import architecture
from powerflow_lit.models.loading import load_config
from powerflow_lit.models.memory import estimate
from tests.commands import command, environment
from tests.tiny_models import make_tiny_model
from tests.unit.test_config import checked

pytestmark = pytest.mark.slow
GIB = 2**30
SETTINGS = (
    "rollout=hf", "refills=1", "logger=none", "trainer=cpu", "model=hf", "model.kind=base",
    "rollout.prompts_per_refill=4", "rollout.samples_per_prompt=8", "rollout.max_new_tokens=224",
    "buffer.updates_per_refill=1", "rollout.engine.sequences_per_batch=32", "model.threads=1",
    "callbacks.evaluation.max_prompts=2", "callbacks.evaluation.samples_per_prompt=2",
    "callbacks.export=false", "rollout.max_prompt_tokens=64", "model.memory_check=false",
    "callbacks.evaluation.base_decodings=[]",
)  # fmt: skip
LARGE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 1408, "num_hidden_layers": 8}  # fmt: skip
RUNS = {
    "full": (),
    "checkpointed": ("model.gradient_checkpointing=true",),
    "lora": ("finetune=lora",),
}


def measured(folder: Path, model: Path, *overrides: str) -> tuple[float, int]:
    """Bytes at the peak, the libraries' included, and tokens of a mean response."""
    settings = (*SETTINGS, f"model.path={model}", *overrides)
    arguments = [*settings, "run_dir=run"]
    done = command("powerflow_lit.train", arguments, folder=folder, env=environment(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["perf/peak_rss_gb"]]
    lengths = [float(row["rollout/length_mean"]) for row in rows if row["rollout/length_mean"]]
    return max(float(row["perf/peak_rss_gb"]) for row in rows) * GIB, round(max(lengths))


def predicted(model: Path, length: int, *overrides: str) -> int:
    """Where every response has so many tokens."""
    config = checked(
        *SETTINGS, f"model.path={model}", f"rollout.max_new_tokens={length}", *overrides
    )
    work = workload(config, Device("here", 0, 0, is_gpu=False))
    shape = load_config(str(model), trust_remote_code=False)
    return estimate(architecture(shape, work.lora, trust_remote_code=False), work).total


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_takes_about_what_was_estimated(tmp_path: Path, kind: str) -> None:
    small = make_tiny_model(tmp_path / "small", "qwen2", num_hidden_layers=1)
    large = make_tiny_model(tmp_path / "large", "qwen2", **LARGE)
    taken, expected = 0.0, 0
    for name, model, sign in (("first", small, -1), ("second", large, 1)):
        folder = tmp_path / name
        folder.mkdir()
        peak, length = measured(folder, model, *RUNS[kind])
        taken += sign * peak
        expected += sign * predicted(model, length, *RUNS[kind])
    print(f"{kind}: estimated {expected / GIB:.2f} GiB, measured {taken / GIB:.2f} GiB")
    assert 0.65 < expected / taken < 1.35  # the allocator keeps what was freed
