"""Several ranks at once: processes that meet over gloo, as the ranks of a run do.

They are forks of the server that `tests.commands` keeps, which has imported the package already.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.commands import SERVER, command, environment


def as_torchrun_starts(
    folder: Path, *overrides: str, world: int = 2
) -> list[subprocess.CompletedProcess[str]]:
    """`powerflow_lit.train trainer=ddp ...` from `folder` on each rank, without torchrun's seconds.

    The environment is what torchrun gives, of which this package and Lightning know nothing else.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {
        "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = ["trainer=ddp", f"trainer.devices={world}", "trainer.accelerator=cpu", *overrides]

    def one(number: int) -> subprocess.CompletedProcess[str]:
        env = {**environment(folder), **ours, "RANK": str(number), "LOCAL_RANK": str(number)}
        return command("powerflow_lit.train", arguments, folder=folder, env=env)

    with ThreadPoolExecutor(world) as ranks:
        return list(ranks.map(one, range(world)))


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
