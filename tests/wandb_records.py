"""What an offline W&B run wrote to disk, read by W&B's own inspector."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class OfflineRun:
    """The records of one `offline-run-*` folder.

    Attributes:
        run: the run's record: id, group, job type, tags, config.
        history: the logged rows, metric name -> value.
        exits: exit codes; one for a run that was finished, none for one left open.
    """

    run: dict[str, Any]
    history: list[dict[str, Any]]
    exits: list[int]

    @property
    def config(self) -> dict[str, Any]:
        return self.run["config"]["update"]


def read_offline_run(folder: Path, home: Path) -> OfflineRun:
    """Records of the `.wandb` file in a folder; `home` keeps the inspector from the user's own."""
    result = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    records = [json.loads(line) for line in result.stdout.splitlines() if line.strip()]
    (run,) = [r["run"] for r in records if r["type"] == "run"]
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    exits = [r["exit"].get("exit_code", 0) for r in records if r["type"] == "exit"]
    return OfflineRun(run, history, exits)
