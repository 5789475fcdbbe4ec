"""What the paper reports, by model: package data with sources, for tables and calibration.

A figure that we do not know is left blank; none is inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

REASONING = "reasoning"
CREATIVE = "creative"


@dataclass(frozen=True)
class Published:
    """Rows of one model. Benchmarks are named as in `benchmark=`, the mean of all is `average`."""

    model: str
    # method -> benchmark -> avg@k in percent (reasoning), or metric -> value in 0..1 (creative)
    rows: dict[str, dict[str, float]]
    metric: str | None  # the `val/` metric of reasoning rows; creative rows name their own
    source: str


def published(kind: str, model: str | None) -> Published | None:
    """What is known of a model (`model.paper_name`) in `reasoning.yaml` or `creative.yaml`."""
    table = _table(kind)
    found = table["models"].get(model)
    if found is None:
        return None
    columns = table["columns"]
    rows = {
        method: {c: float(v) for c, v in zip(columns, values, strict=True) if v is not None}
        for method, values in found.items()
    }
    return Published(str(model), rows, table["metric"], table["source"])


def models(kind: str) -> list[str]:
    """Names of the models that a file has rows of."""
    return list(_table(kind)["models"])


def notes(kind: str) -> dict[str, Any]:
    """What the file says beside its rows: source, protocol, spread, further figures."""
    return {k: v for k, v in _table(kind).items() if k not in ("models", "columns")}


@cache
def _table(kind: str) -> dict[str, Any]:
    path = resources.files(__package__) / f"{kind}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
