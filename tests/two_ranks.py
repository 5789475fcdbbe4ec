"""Functions run on several ranks at once: processes that meet over gloo, as the ranks of a run do.

They are forks of the server that `tests.commands` keeps, which has imported the package already.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.commands import SERVER


def on_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What a module-level function returns on each rank; what it raises there fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            SERVER.Process(target=_run, args=(folder, number, world, function, arguments))
            for number in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.is_alive():
                process.kill()
        found = []
        for number in range(world):
            error = Path(folder, f"{number}.error")
            assert not error.exists(), f"rank {number}:\n{error.read_text()}"
            found.append(torch.load(Path(folder, f"{number}.pt"), weights_only=False))
    return found


def _run(
    folder: str, number: int, world: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    try:
        dist.init_process_group(
            "gloo", store=store, rank=number, world_size=world, timeout=timedelta(seconds=60)
        )
        torch.save(function(*arguments), Path(folder, f"{number}.pt"))
        dist.barrier()  # nobody leaves while another still talks
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{number}.error").write_text(traceback.format_exc())
