"""Training runs in processes of their own, to be killed, starved and looked at afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.commands import VLLM_CACHE

# a run of four refills in seconds
QUICK = (
    "debug=fast", "logger=none", "refills=4", "callbacks.evaluation.every_n_refills=2",
    "callbacks.evaluation.max_prompts=16",
)  # fmt: skip


def start(
    folder: Path, *overrides: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`python -m powerflow_lit.train ...` from `folder`, in a process group of its own.

    Its output is one stream, line by line.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    own = {"PYTHONUNBUFFERED": "1", "VLLM_CACHE_ROOT": VLLM_CACHE}
    return subprocess.Popen(
        [sys.executable, "-m", "powerflow_lit.train", *overrides],
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
