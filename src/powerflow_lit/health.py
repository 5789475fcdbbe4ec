"""What went wrong in a run without ending it: said once, and kept for summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.rollout.degenerate import findings
from powerflow_lit.trajectories import own_samples


@dataclass(frozen=True)
class RunWarning:
    """One line, and the refill (from 1) at which it was said."""

    refill: int
    text: str


def warnings_of(callbacks: Sequence[L.Callback]) -> list[str]:
    """The warnings that callbacks hold, as lines of summary.json, in the order of refills."""
    found: list[RunWarning] = [w for c in callbacks for w in getattr(c, "warnings", ())]
    return [f"refill {w.refill}: {w.text}" for w in sorted(found, key=lambda w: w.refill)]


class Health(Callback):
    """Looks at each refill's rollouts; what holds for all of them is said once for each streak.

    Attributes:
        warnings: what was printed, engines that were built anew included.
    """

    def __init__(self) -> None:
        self.warnings: list[RunWarning] = []
        self._present: set[str] = set()  # findings of the last refill

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for part in (_data(trainer), pl_module):
            part.on_warning = lambda text: self._keep(trainer, text)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = _data(trainer)
        own, limit = own_samples(data.buffer.newest), data.settings.max_new_tokens
        found = findings(own, max_new_tokens=limit)
        for finding in found:
            if finding.name not in self._present:
                pl_module.print(f"warning: refill {trainer.current_epoch + 1}: {finding.text}")
                self._keep(trainer, finding.text)
        self._present = {finding.name for finding in found}

    def _keep(self, trainer: L.Trainer, text: str) -> None:
        self.warnings.append(RunWarning(trainer.current_epoch + 1, text))

    def state_dict(self) -> dict[str, Any]:
        return {
            "warnings": [[w.refill, w.text] for w in self.warnings],
            "present": sorted(self._present),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warnings = [RunWarning(*w) for w in state_dict["warnings"]]
        self._present = set(state_dict["present"])


def _data(trainer: L.Trainer) -> RolloutDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, RolloutDataModule)
    return data
