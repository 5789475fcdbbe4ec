"""Answers compared by math-verify in a process that can be stopped, from any thread.

A model sooner or later writes `9^{9^{9^9}}`. math-verify's own limit is an alarm signal: it works
in the main thread only, replaces the host's handler, and does not interrupt one huge operation.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock

from powerflow_lit.tasks.base import TaskError

WORKER = Path(__file__).with_name("symbolic_worker.py")
CPU_SECONDS = 3.0  # of one comparison; those of the public benchmarks take 0.3 at most
log = logging.getLogger(__name__)


class SymbolicComparison:
    """A worker process, started at its first question and again after one that it died of.

    Attributes:
        undecided: comparisons that were stopped; they count as different.
    """

    def __init__(self, *, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds
        self.undecided = 0
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether math-verify finds the two LaTeX texts equal.

        Raises:
            TaskError: the worker cannot be started.
        """
        if os.getpid() != self._owner:  # a forked child must not share its parent's pipe or lock
            self._lock, self._process, self._owner = Lock(), None, os.getpid()
        with self._lock:
            try:
                reply = self._ask(json.dumps([answer, reference]))
            except BaseException:  # Ctrl-C: the reply that is still to come is nobody's
                self.close()
                raise
        if reply is None:
            self.undecided += 1
            if self.undecided == 1:
                log.warning(
                    "an answer took over %g s to compare and counts as wrong: %.60r "
                    "(further ones are not named)",
                    self.cpu_seconds,
                    answer,
                )
        return reply == "1"

    def close(self) -> None:
        """Ends the worker; a later question starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]

    def _ask(self, question: str) -> str | None:
        """The reply; None if the worker died of the question, not of something before it."""
        for process in (self._process, None):
            process = process or self._start()
            with suppress(OSError):
                process.stdin.write(question + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                reply = process.stdout.readline().strip()  # type: ignore[union-attr]
                if reply:
                    return reply
                self.close()
                return None
            self.close()  # it had ended while nothing was asked
        return None

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", str(WORKER), str(self.cpu_seconds)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._process.stdout.readline() != "ready\n":  # type: ignore[union-attr]
            self.close()
            raise TaskError(
                "answers cannot be compared: `python -c 'import math_verify'` says why; "
                "reinstall math-verify[antlr4-9-3]"
            )
        return self._process


compare = SymbolicComparison(cpu_seconds=CPU_SECONDS)
atexit.register(compare.close)
