"""Contenders take turns: each a process of its own, held at a gate until it is told to refill.

So whatever else the machine does falls on all of them alike, and each has its own peak memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
MARK = "@bench "  # begins a line of the protocol
WARM_UP_TOKENS = 16  # of the longest response in a warm-up


class ContenderError(RuntimeError):
    """A contender's process ended before it was asked to."""


class Gate:
    """In the contender: reports a refill, then waits to be told to make the next.

    A refill lasts from one gate to the next, so that nothing between its phases is left out.
    """

    def __init__(self) -> None:
        # libraries print to standard output: that goes to the log, and the protocol keeps the pipe
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._phases: dict[str, float] = defaultdict(float)
        self._begun: tuple[float, float] | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds within to a phase of this refill."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        self._phases[name] += seconds

    @property
    def begun(self) -> float:
        """When this refill began, on the clock of `time.perf_counter`; 0 before the first."""
        return self._begun[0] if self._begun else 0.0

    def seconds(self, *names: str) -> float:
        """Of these phases in this refill so far."""
        return sum(self._phases[name] for name in names)

    def wait(self, **further: Any) -> int | None:
        """Ends a refill and waits for the next; leaves the process when there is none.

        Args:
            further: reported with the refill that ends.

        Returns:
            Tokens to cut the responses of the next refill to; None: it is one to be timed.
        """
        if self._begun is None:
            self._say({"ready": True})
        else:
            wall, cpu = self._begun
            self._say(
                {
                    "wall_s": time.perf_counter() - wall,
                    "cpu_s": time.process_time() - cpu,
                    "phases": dict(self._phases),
                    **further,
                }
            )
        give_back_memory()
        order = sys.stdin.readline().strip()
        if order not in ("go", "warm up"):
            self.leave()
        self._phases.clear()
        self._begun = time.perf_counter(), time.process_time()
        return None if order == "go" else WARM_UP_TOKENS

    def leave(self) -> None:
        """Report the peak memory and end at once: engines take long to shut down."""
        self._say({"peak_mb": peak_mb()})
        os._exit(0)

    def _say(self, message: Mapping[str, Any]) -> None:
        self._out.write(MARK + json.dumps(message) + "\n")
        self._out.flush()


def give_back_memory() -> None:
    """Let the system have what was freed: the others need it while they have their turns."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def peak_mb() -> float:
    """Largest resident size of this process so far, MB (10^6 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(s.split()[1]) * 1024 / 1e6 for s in lines if s.startswith("VmHWM:"))


class Contender:
    """In the runner: a process that refills when asked.

    Args:
        module: `python -m module`, which reads its settings as JSON from its one argument.
        log: file that takes what the process prints.
    """

    def __init__(self, name: str, module: str, settings: Mapping[str, Any], log: Path) -> None:
        self.name, self._log = name, log
        threads = str(settings["threads"])
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(p or str(ROOT) for p in sys.path),
                    "OMP_NUM_THREADS": threads,
                    "MKL_NUM_THREADS": threads,
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        self._read()  # until it is ready

    def refill(self) -> dict[str, Any]:
        """What it measured in one refill.

        Raises:
            ContenderError: with the last lines of its log.
        """
        self._tell("go")
        return self._read()

    def warm_up(self) -> None:
        """A refill of short responses: engines are built, kernels loaded, memory taken."""
        self._tell("warm up")
        self._read()

    def stop(self) -> dict[str, Any]:
        """Ends it; what it reports of itself as a whole."""
        self._tell("stop")
        found = self._read()
        self._process.wait()
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self, word: str) -> None:
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        try:
            stdin.write(word + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout or ():
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))  # type: ignore[no-any-return]
        raise self._failed()

    def _failed(self) -> ContenderError:
        code = self._process.wait()
        why = f"ended too soon (exit status {code})"
        if code == -signal.SIGKILL:
            why = "was killed, as the system does where memory runs out"
        lines = self._log.read_text().strip().splitlines()
        return ContenderError("\n".join([f"{self.name} {why}:", *lines[-12:]]))
