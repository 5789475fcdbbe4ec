"""Writing a run's checkpoints: at the end of refills, between updates, and when it is stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from powerflow_lit import ranks
from powerflow_lit.callbacks import due
from powerflow_lit.disk import dropped, named
from powerflow_lit.interrupt import Stopped
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.shard_files import remove_unused

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
ROWS = ("metrics.csv", "problems.csv", "samples.jsonl")
GOOD = "good.ckpt"  # the last that kept all stop rules of a monitor


class Checkpoint(Callback):
    """Keeps `checkpoints/last.ckpt`, and `previous.ckpt`, which is what it was before.

    A new file is written aside, flushed to the disk and only then renamed, so that a kill at any
    moment leaves a whole `last.ckpt`. A stop by a signal is saved where it was asked for: a refill
    that was broken off is made again on resume (it depends on the seed alone), updates that were
    made are not, and an evaluation that was broken off is due again.

    Args:
        every_n_refills: a checkpoint at the end of each so many refills.
        every_n_updates: also after each so many updates of a refill; None: not between them.
        keep_previous: False saves the disk space of one checkpoint.
        identity: what must be the same on resume (`resume.IDENTITY`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_refills: int,
        every_n_updates: int | None,
        keep_previous: bool,
        identity: Mapping[str, Any],
    ) -> None:
        self.path = folder / "checkpoints" / LAST
        self.every_n_refills, self.every_n_updates = every_n_refills, every_n_updates
        self.keep_previous, self.identity = keep_previous, dict(identity)
        self._within_refill = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.every_n_updates is not None and (batch_idx + 1) % self.every_n_updates == 0:
            self._save(trainer, pl_module, within_refill=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a monitor that stops the run has chosen the checkpoint that stands
        if due(trainer, self.every_n_refills) and not trainer.should_stop:
            self._save(trainer, pl_module, within_refill=False)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        stopped = isinstance(exception, Stopped) and not exception.at_once
        # Lightning's own, where the signal came at the very end of a refill
        if stopped or isinstance(exception, SIGTERMException):
            self._save(trainer, pl_module, within_refill=True)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        whole_refills = trainer.current_epoch + (not self._within_refill)
        checkpoint["run"] = {
            "updates": trainer.global_step,
            "refills": whole_refills,
            "identity": self.identity,
        }
        if self._within_refill:
            _between_updates(checkpoint["loops"]["fit_loop"], trainer.global_step)

    def _save(self, trainer: L.Trainer, module: L.LightningModule, *, within_refill: bool) -> None:
        assert isinstance(module, PowerFlowModule)
        if ranks.greatest(int(not module.is_healthy)):  # what stands is good, and this is not
            module.print(
                "warning: no checkpoint: the last update was skipped, or broke the weights"
            )
            return
        self._within_refill = within_refill
        aside = self.path.with_suffix(".ckpt.tmp")
        failed: OSError | None = None
        try:
            if trainer.is_global_zero:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with named(self.path), dropped(aside):
                trainer.save_checkpoint(aside)
        except OSError as error:
            failed = error
            trainer.strategy.barrier()  # at which the others wait for the file
        ranks.together(failed)
        if not trainer.is_global_zero:  # its state is gathered, or in a file of its own
            return
        # the rows that it counts on must not be lost where it is not
        for path in (aside, *(self.path.parents[1] / name for name in ROWS)):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if self.keep_previous and self.path.exists():
            link(self.path, self.path.with_name(PREVIOUS))
        os.replace(aside, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is in the folder, not in the file
        finally:
            os.close(folder)
        remove_unused(self.path.parent)


def _between_updates(fit_loop: dict[str, Any], updates: int) -> None:
    """Lightning's progress as of a moment between two updates, whatever hook it was taken in.

    Counted as ready but not as done, an update would be lost on resume; with `is_last_batch`
    Lightning would leave out what is due at the end of the refill.
    """
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    for counts in (epoch["total"], epoch["current"]):
        counts["processed"] = counts["completed"]
    for counts in (batch["total"], batch["current"]):
        counts["ready"] = counts["started"] = counts["completed"] = counts["processed"]
    batch["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = updates


def link(source: Path, target: Path) -> None:
    """Make `target` the file that `source` is now, if there is one, at no cost in disk or time.

    The checkpoint is always renamed into place, so that a hard link keeps the old one.
    """
    if not source.exists():
        return
    aside = target.with_suffix(".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # a file system without hard links
        shutil.copy2(source, aside)
    os.replace(aside, target)
    aside.unlink(missing_ok=True)  # renaming between links of one file leaves both
