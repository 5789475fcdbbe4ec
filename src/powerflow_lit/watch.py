"""A rank that ends takes the others with it, with a word, wherever they are.

Ranks that talk over gloo notice at once when one is gone, those amid a rollout do not. So where
Lightning has started the others from the first rank, that one looks after its children, and they
after their parent. torchrun and SLURM look after theirs themselves.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from types import TracebackType

import lightning as L
import torch.distributed as dist

from powerflow_lit.config.processes import TOLD, rank_here
from powerflow_lit.mendable import MendableError

LOOK_S = 0.5
UNWIND_S = 30.0  # until a rank that knows of a lost one must be gone, wherever it hangs
# what gloo, NCCL and the store say when a peer is gone; torch has no class for all of them
GONE = re.compile(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe")


class LostRankError(MendableError, RuntimeError):
    """Another rank of the run has ended."""


class Watch:
    """Looks after the other ranks while the run lasts, as a context manager.

    Within, an error of torch that comes of a lost rank becomes a `LostRankError`.

    Args:
        how_to_go_on: what a user is told to do then.
    """

    def __init__(self, trainer: L.Trainer, how_to_go_on: str) -> None:
        self._launcher = trainer.strategy.launcher
        self._how = how_to_go_on
        self._parent = os.getppid()
        self._started: list[subprocess.Popen] = []
        self._over = threading.Event()
        self.lost: str | None = None

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._take_over()
        several = self.lost is not None or (dist.is_initialized() and dist.get_world_size() > 1)
        told = isinstance(error, MendableError)  # it says itself what is gone, e.g. a server
        if isinstance(error, RuntimeError) and several and not told and GONE.search(str(error)):
            said = str(error).strip().partition("\n")[0]
            lost = self.lost or f"another rank has ended, or does not answer ({said})"
            raise LostRankError(self._said(lost)) from error

    def check(self) -> None:
        """Raises LostRankError if a rank is gone."""
        if self.lost is not None:
            raise LostRankError(self._said(self.lost))

    def end_others(self, within: float = UNWIND_S) -> None:
        """See to it that no process that this one has started is left."""
        for process in self._started:
            try:
                process.wait(within)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def pass_on(self, number: int) -> None:
        """A signal to the processes that this one has started."""
        for process in self._started:
            process.send_signal(number)

    def _take_over(self) -> None:
        """Lightning's own observer would kill this process, without a word, where a child ends
        with an error; it looks at this list every 5 s and goes home when it is empty."""
        children: list[subprocess.Popen] = getattr(self._launcher, "procs", [])
        self._started += [p for p in children if p not in self._started]
        children.clear()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            self._take_over()
            for number, process in enumerate(self._started, start=1):
                if process.poll():
                    how = _ending(process.returncode)
                    self._lose(f"rank {number} (process {process.pid}) has ended {how}")
                    return
            if TOLD in os.environ and rank_here() > 0 and os.getppid() != self._parent:
                self._lose(f"rank 0 (process {self._parent}) has ended")
                return

    def _lose(self, what: str) -> None:
        self.lost = what
        self._take_over()
        here = f"rank {rank_here()}: " if rank_here() else ""
        print(f"error: {here}{self._said(what)}", file=sys.stderr, flush=True)
        last_resort = threading.Timer(UNWIND_S, self._leave)
        last_resort.daemon = True
        last_resort.start()

    def _leave(self) -> None:
        for process in self._started:
            process.kill()
        os._exit(1)

    def _said(self, what: str) -> str:
        return f"{what}, so the run ends; {self._how}"


def _ending(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
