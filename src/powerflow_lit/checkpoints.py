"""Writing the checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from powerflow_lit.callbacks import due
from powerflow_lit.disk import dropped, named

LAST = "last.ckpt"


class Checkpoint(Callback):
    """Writes `checkpoints/last.ckpt` aside and renames it, so that one good file always stands."""

    def __init__(self, folder: Path, *, every_n_refills: int) -> None:
        self.path = folder / "checkpoints" / LAST
        self.every_n_refills = every_n_refills

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a monitor that stops the run has chosen the checkpoint that stands
        if not due(trainer, self.every_n_refills) or trainer.should_stop:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".ckpt.tmp")
        with named(self.path), dropped(aside):
            trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, self.path)
