"""Training runs in processes of their own, to be killed, starved and looked at afterwards."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from powerflow_lit.shard_files import read_part, shard_folder
from tests.commands import VLLM_CACHE

# a run of four refills in seconds
QUICK = (
    "debug=fast", "logger=none", "refills=4", "callbacks.evaluation.every_n_refills=2",
    "callbacks.evaluation.max_prompts=16",
)  # fmt: skip


REFILL = "powerflow_lit.datamodule:RolloutDataModule.refill"
TICK = (
    "powerflow_lit.console:RefillProgress.show"  # for each token or so of rollouts and evaluations
)
EVALUATION = "powerflow_lit.callbacks:Evaluation._evaluate"
SAVE = "powerflow_lit.checkpoints:Checkpoint._save"
STEP = "powerflow_lit.module:PowerFlowModule.configure_gradient_clipping"  # before it is made


def start(
    folder: Path,
    *overrides: str,
    env: Mapping[str, str] | None = None,
    fault: tuple[str, str] | None = None,
    launcher: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """`python -m powerflow_lit.train ...` from `folder`, in a process group of its own.

    Its output is one stream, line by line. `fault`: a moment and an action, see `faulty_train`.
    `launcher`: what python is given before `-m powerflow_lit.train`, as torchrun's module.
    """
    command = [*launcher, "-m", "powerflow_lit.train"]
    if fault is not None:
        command = [str(Path(__file__).with_name("faulty_train.py")), *fault]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    own = {"PYTHONUNBUFFERED": "1", "VLLM_CACHE_ROOT": VLLM_CACHE}
    return subprocess.Popen(
        [sys.executable, *command, *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, **own, "HOME": str(folder), **(env or {})},
        start_new_session=True,
    )


def until_line(process: subprocess.Popen[str], part: str) -> list[str]:
    """Reads the output up to the first line that holds `part`; fails if none does."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if part in line:
            return seen
    raise AssertionError(f"no line with {part!r} in:\n{''.join(seen)}")


def end_of(process: subprocess.Popen[str], *, within: float) -> tuple[int, str]:
    """Exit code and the rest of the output; fails if the process takes longer (seconds)."""
    output, _ = process.communicate(timeout=within)
    return process.returncode, output


def killed_at(folder: Path, line: str, *overrides: str) -> None:
    """A run that is killed without warning when it prints such a line."""
    process = start(folder, *overrides)
    until_line(process, line)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def left_of(process: subprocess.Popen[str], *, after: float = 30) -> str:
    """Processes of the group that are still there `after` seconds; W&B's service follows slowly."""
    deadline = time.monotonic() + after
    while True:
        found = subprocess.run(
            ["pgrep", "-a", "-g", str(process.pid)], capture_output=True, text=True
        ).stdout
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """The signal to the run's own process, as the kernel or a scheduler sends it."""
    os.kill(process.pid, number)


def finish(folder: Path, *overrides: str, launcher: Sequence[str] = ()) -> str:
    """A run to its end; returns what it printed."""
    process = start(folder, *overrides, launcher=launcher)
    code, output = end_of(process, within=600)
    assert code == 0, output[-3000:]
    return output


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def last_checkpoint(run: Path) -> dict[str, Any]:
    """What it holds, the parts of all ranks included where it is in parts."""
    path = run / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    folder = shard_folder(path, state)
    if folder is not None:
        count = len(state.pop("shards")["bytes"])
        state["parts"] = [read_part(folder, rank) for rank in range(count)]
        for part in state["parts"]:
            del part["folder"]  # a name of its own for each checkpoint
    return state


def assert_same(expected: Any, found: Any, where: str = "") -> None:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_same(expected[key], found[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), where
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_same(one, other, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), where
    else:
        assert expected == found or (expected != expected and found != found), where


def assert_same_run(expected: Path, found: Path) -> None:
    """Two finished runs: weights, optimizer, buffer, random states, metrics, samples, export."""
    states = [last_checkpoint(run) for run in (expected, found)]
    for state in states:
        del state["loops"]  # Lightning's counts of hooks begun, which a restart counts again
        del state["RolloutDataModule"]["clock"]
    assert_same(*states, where="checkpoint")
    for name in ("metrics.csv", "problems.csv"):
        tables = [rows_of(run / name) for run in (expected, found)]
        for rows in tables:
            for row in rows:
                for timed in [key for key in row if key.startswith("perf/")]:
                    del row[timed]
        assert_same(*tables, where=name)
    files = [
        "samples.jsonl",
        "export/model.safetensors",
        "export/adapter/adapter_model.safetensors",
    ]
    for name in [name for name in files if (expected / name).exists()]:
        assert (expected / name).read_bytes() == (found / name).read_bytes(), name
    summaries = [summary_of(run) for run in (expected, found)]
    for name in ("status", "base", "base_decodings", "final", "refills", "steps", "tokens"):
        assert summaries[0][name] == summaries[1][name], name
