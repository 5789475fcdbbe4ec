"""Which of a run's processes this is, as whoever started it says; imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

# what the first rank tells those that Lightning starts from it (`meeting`); theirs alone has it
TOLD = "POWERFLOW_LIT_RANKS"
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which a person starts the processes


def started() -> tuple[int, int] | None:
    """This process's rank and the number of ranks; None where nobody has started several."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:  # torchrun
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if TOLD in env and "LOCAL_RANK" in env:  # Lightning, on this machine
        return int(env["LOCAL_RANK"]), int(json.loads(env[TOLD])["ranks"])
    tasks = int(env.get("SLURM_NTASKS", "1"))
    if tasks > 1 and "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in INTERACTIVE:
        return int(env["SLURM_PROCID"]), tasks
    return None


def rank_here() -> int:
    """0 is the rank that writes files and talks to the user."""
    found = started()
    return 0 if found is None else found[0]


def devices_asked(trainer: Mapping[str, Any]) -> int | None:
    """Devices of each node by the `trainer` group; None: as many as there are."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and devices != "auto":
        numbers = [part for part in devices.split(",") if part.strip()]
        devices = len(numbers) if "," in devices else int(devices) if _whole(devices) else None
    return devices if isinstance(devices, int) and devices > 0 else None


def _whole(text: str) -> bool:
    return text.strip().lstrip("-").isdigit()
