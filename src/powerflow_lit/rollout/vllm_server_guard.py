"""Runs a command that must not outlive the process that asked for it.

    python vllm_server_guard.py <pid of that process> <folder> <command ...>

A script of the standard library alone, so that it starts at once and takes little memory. It ends
the command's whole process group when it is told to (SIGTERM), or when its own parent is gone,
also if that was killed without warning; then it drops the folder too, and those that the folder's
file `leftovers` names, which the parent would have dropped. The parent-death signal of Linux would
not do: it follows the thread that started a process, and an engine may have to be started again
from a passing one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

POLL_S = 0.2
LEFTOVERS = "leftovers"
GRACE_S = 10.0  # from SIGTERM to SIGKILL


def guard(parent: int, folder: Path, command: Sequence[str]) -> int:
    """Exit code of the command, or of what ended it; nothing of its group is left then."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_guard)
    try:
        while child.poll() is None and not asked and os.getppid() == parent:
            time.sleep(POLL_S)
    finally:
        _end(child)
    if os.getppid() != parent:
        _drop(folder)
    code = child.returncode
    return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


def _drop(folder: Path) -> None:
    with suppress(OSError):
        for line in (folder / LEFTOVERS).read_text().splitlines():
            shutil.rmtree(line, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    with suppress(ProcessLookupError):  # also where the command itself has ended before its workers
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _end_with_guard() -> None:
    """In the child: SIGTERM when the guard itself is killed (Linux); it starts no threads."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
