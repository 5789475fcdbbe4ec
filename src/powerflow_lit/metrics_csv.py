"""metrics.csv: what a run logs, a row a step."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from powerflow_lit.disk import named, written_aside


class MetricsCsv(Logger):
    """One row per logged step, `step` and `refill` first; a resumed run continues the file.

    Metrics logged for the newest step are merged into its row. The file is rewritten whole and
    renamed when a new metric widens it, and appended to otherwise.
    """

    def __init__(self, folder: Path, *, keep_until: int | None = None) -> None:
        """`keep_until`: the step of the checkpoint resumed from; rows beyond it are cut."""
        super().__init__()
        self.path = folder / "metrics.csv"
        self._columns = ["step", "refill"]
        self._rows: list[dict[str, Any]] = []
        if keep_until is not None and self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or self._columns)
                self._rows = [dict(r) for r in reader if _complete(r, keep_until)]
        self._write_all()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {k: float(v) for k, v in metrics.items() if k not in ("step", "refill", "epoch")}
        refill = {"refill": int(metrics["refill"])} if "refill" in metrics else {}
        new = [name for name in row if name not in self._columns]
        self._columns += new
        merged = bool(self._rows) and int(self._rows[-1]["step"]) == step
        if merged:
            self._rows[-1].update(row | refill)
        else:
            self._rows.append({"step": step, **refill, **row})
        if new or merged:
            self._write_all()
        else:
            with named(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(self._rows[-1])

    def _write_all(self) -> None:
        with written_aside(self.path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


def _complete(row: Mapping[str, str | None], keep_until: int) -> bool:
    """Whether a row was written whole and belongs to the steps to keep."""
    return None not in row.values() and int(row["step"] or 0) <= keep_until
