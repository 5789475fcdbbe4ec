"""`powerflow_lit.train` with a fault at a chosen moment: the process sends a signal to itself.

python faulty_train.py MOMENT ACTION [overrides]

MOMENT is a chain of calls, `module:Class.method#3>module:function#2`: the second call of the
function after the third call of the method has begun. ACTION is a signal, or `SIGINT*2` for two of
them a second apart, or `servers` to kill the servers that it has started. Everything else is the
real program.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any


def at(moment: str, action: Callable[[], None]) -> None:
    """Arrange for `action` when the chain of calls is complete."""
    stages = moment.split(">")
    reached = 0

    def called(number: int, left: list[int]) -> None:
        nonlocal reached
        if reached != number:
            return
        left[0] -= 1
        if left[0] == 0:
            reached += 1
            if reached == len(stages):
                action()

    for number, stage in enumerate(stages):
        target, _, count = stage.partition("#")
        _wrap(target, partial(called, number, [int(count)]))


def _wrap(target: str, called: Callable[[], None]) -> None:
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, leaf = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, leaf)

    def counting(*arguments: Any, **named: Any) -> Any:
        called()
        return real(*arguments, **named)

    setattr(owner, leaf, counting)


def sender(action: str) -> Callable[[], None]:
    name, _, times = action.partition("*")

    def send() -> None:
        if name == "servers":
            print(f"FAULT {name} {servers_of(os.getpid())}", flush=True)
            for server in servers_of(os.getpid()):
                os.kill(server, signal.SIGKILL)
            return
        for i in range(int(times or 1)):
            if i:
                time.sleep(1)
            print(f"FAULT {name} {time.time()}", flush=True)
            os.kill(os.getpid(), signal.Signals[name])

    return send


def servers_of(pid: int) -> list[int]:
    """Processes of the servers that a run has started: `vllm serve` below its guards."""
    return [child for guard in _children(pid) if _is_guard(guard) for child in _children(guard)]


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def _is_guard(pid: int) -> bool:
    with suppress(OSError):
        return b"vllm_server_guard" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


if __name__ == "__main__":
    from powerflow_lit import train
    from powerflow_lit.config.processes import TOLD

    overrides = sys.argv[1:]
    if TOLD not in os.environ:  # other ranks are started with this file too, and have no fault
        moment, action, *overrides = overrides
        at(moment, sender(action))
    sys.argv = [__file__, *overrides]
    train.main()
