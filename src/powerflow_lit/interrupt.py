"""Signals that ask a run to stop: noted at once, acted on where the run can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from powerflow_lit import ranks
from powerflow_lit.watch import Watch

LAST_RESORT_S = 20  # after a second signal; then the process ends wherever it hangs
ONE_CAUSE_S = 0.5  # launchers pass on a signal that the process has had already


class Stopped(SystemExit):
    """A signal asked the run to stop; the exit code is 128 + its number.

    Attributes:
        at_once: it was asked twice, so nothing more is to be saved.
    """

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        super().__init__(128 + number)
        self.signal, self.at_once = signal.Signals(number), at_once

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:  # to be told to other ranks
        return type(self), (int(self.signal),)


class StopSignals:
    """Takes the signals that stop a run, as a context manager, and gives them back at its end.

    Python drops an exception that is raised inside a destructor or a library's callback, and one
    raised amid an update would leave half of it. So while `deferred` holds a first signal only
    takes a note, which `check` reads where raising is safe; else it raises at once. A second
    signal raises wherever the process is, and ends it after `LAST_RESORT_S` seconds.

    Args:
        names: signals beside SIGINT (Ctrl-C), e.g. `SIGTERM`, and `SIGUSR1` as SLURM may send it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.numbers = [signal.SIGINT, *(signal.Signals[name] for name in names)]
        self.requested: signal.Signals | None = None
        self.pass_on: Callable[[int], None] | None = None  # to ranks that this process has started
        self._deferred = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for number in self.numbers:
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (ignored and number == signal.SIGHUP):  # nohup means it to stay ignored
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # whoever started the run may have an answer of its own, as submitit requeues the job: now
        # that all is saved it is its turn
        if kind is Stopped and self.requested is not None and not getattr(error, "at_once", False):
            before = self._previous.get(self.requested)
            if callable(before) and before is not signal.default_int_handler:
                signal.raise_signal(self.requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this holds the first signal raises in `check` only."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raises `Stopped` if a signal came since the start."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, now = self.requested is not None, time.monotonic()
        if again and now - self._since < ONE_CAUSE_S:
            return
        self.requested, self._since = signal.Signals(number), now
        if self.pass_on is not None:
            self.pass_on(number)
        if again:
            last_resort = threading.Timer(LAST_RESORT_S, os._exit, (128 + number,))
            last_resort.daemon = True
            last_resort.start()
            raise Stopped(number, at_once=True)
        what = "Ctrl-C" if number == signal.SIGINT else self.requested.name
        print(f"stopping: {what} (once more: at once, unsaved)", flush=True)
        if not self._deferred:
            raise Stopped(number)


class StopWhereSafe(Callback):
    """Reads the note between updates, and as rollouts, scores and evaluations go on.

    A note of one rank stops them all, at the end of the update or of their shares of a phase.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.watch: Watch | None = None  # whether all ranks are still there

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        show = data.on_progress

        def checked(*arguments: Any) -> None:
            self.signals.check()
            if self.watch is not None:
                self.watch.check()
            if show is not None:
                show(*arguments)

        data.on_progress = checked

    def on_train_batch_end(self, *_: Any) -> None:
        number = ranks.greatest(int(self.signals.requested or 0))
        if number:
            raise Stopped(number)
