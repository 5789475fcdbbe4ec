"""alpha learns from a refill's own rollouts at the refill's end, where a target steers it."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from powerflow_lit.callbacks import log, parts_of
from powerflow_lit.health import RunWarning
from powerflow_lit.module import PowerFlowModule


class Steering(Callback):
    """Tells the module which rollouts are fresh, and ends its refills.

    It stands after all that looks at a refill under the alpha that it was trained with, and before
    the monitor and the checkpoint.

    Attributes:
        warnings: what was printed: a target that is out of reach, once a run.
    """

    def __init__(self) -> None:
        self.warnings: list[RunWarning] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module, data = parts_of(trainer)
        # with overlap=true they are of a refill before, but never of two policies
        module.fresh.version = max(t.policy_version for t in data.buffer.newest)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PowerFlowModule)
        if pl_module.automatic is None:
            return
        if not pl_module.end_refill():
            return
        refill = trainer.current_epoch + 1
        metrics = {f"train/{name}": value for name, value in pl_module.automatic.metrics.items()}
        log(trainer, metrics, step=trainer.global_step, refill=refill)
        why = pl_module.automatic.out_of_reach
        if why is not None and not self.warnings:
            pl_module.print(f"warning: refill {refill}: {why}")
            self.warnings.append(RunWarning(refill, why))

    def state_dict(self) -> dict[str, Any]:
        return {"warnings": [[w.refill, w.text] for w in self.warnings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warnings = [RunWarning(*w) for w in state_dict["warnings"]]
