"""Ctrl-C that is never lost: noted at once, acted on at the next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class StopOnInterrupt(Callback):
    """Stops the run at the next update or finished response after Ctrl-C; a second one at once.

    Python drops a KeyboardInterrupt that is raised inside a destructor or a library's callback,
    and the run would go on. So the handler only takes a note, which is read where raising is safe.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.signal(signal.SIGINT, self._note)
        data = trainer.datamodule  # type: ignore[attr-defined]
        show = data.on_progress

        def checked(*arguments: Any) -> None:
            self.check()
            if show is not None:
                show(*arguments)

        data.on_progress = checked

    def on_train_batch_start(self, *_: Any) -> None:
        self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came since the start."""
        if self.requested:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Give Ctrl-C back; safe to call twice."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True
        print("stopping (Ctrl-C again: at once)", flush=True)
