"""The values of `alpha_schedule=`: of a schedule by progress, and of one that aims at a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerflow_lit.config.rules import at_least, check_numbers, is_ours, one_of, positive, require

AUTOMATIC_ALPHA = (  # what a schedule says that aims at a target, beside the target
    "start", "rate", "gain", "smoothing", "largest_gap", "alpha_min", "alpha_max", "scope",
    "patience",
)  # fmt: skip


def check_schedule(node: Mapping[str, Any]) -> None:
    """Every value of an `alpha_schedule=` choice by itself; others' own are left to them."""
    if not is_ours(node):
        return
    names = {"start", "share", *AUTOMATIC_ALPHA} - {"scope"}
    numbers = {name: node[name] for name in sorted(names) if name in node}
    check_numbers("alpha_schedule", numbers, whole=("patience",))
    positive(
        {
            f"alpha_schedule.{n}": numbers.get(n, 1)
            for n in ("start", "rate", "largest_gap", "alpha_min")
        }
    )
    share = numbers.get("share", 1)
    require(0 < share <= 1, f"alpha_schedule.share={share}: must lie in (0, 1], of the refills")
    if "target" in node:
        _check_automatic_alpha(node, numbers)


def _check_automatic_alpha(node: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
    """A schedule that aims at a target; its numbers are numbers."""
    for name in AUTOMATIC_ALPHA:
        require(name in node, f"alpha_schedule.{name} is missing: set alpha_schedule.{name}=")
    at_least(0, {"alpha_schedule.gain": numbers["gain"]})
    at_least(1, {"alpha_schedule.patience": numbers["patience"]})
    one_of("alpha_schedule.scope", node["scope"], ("global", "prompt"))
    smoothing = numbers["smoothing"]
    require(
        0 <= smoothing < 1,
        f"alpha_schedule.smoothing={smoothing}: must lie in [0, 1), a share of the old gap",
    )
    start, low, high = numbers["start"], numbers["alpha_min"], numbers["alpha_max"]
    require(
        low < high,
        f"alpha_schedule.alpha_min={low} and alpha_schedule.alpha_max={high} leave alpha no room",
    )
    require(
        low <= start <= high,
        f"alpha_schedule.start={start}: must lie between alpha_schedule.alpha_min={low} and "
        f"alpha_schedule.alpha_max={high}; alpha= sets it",
    )
    target = node["target"]
    if not isinstance(target, Mapping) or not is_ours(target):
        return
    amounts = {name: target[name] for name in ("ratio", "budget") if name in target}
    check_numbers("alpha_schedule.target", amounts)
    positive({f"alpha_schedule.target.{name}": value for name, value in amounts.items()})
    if "per" in target:
        one_of("alpha_schedule.target.per", target["per"], ("token", "response"))
        require(
            start != 1,
            "alpha_schedule.start=1.0: a KL budget says how far from the base, and the side on "
            "which alpha starts says which way: set alpha above 1 to sharpen, or below to flatten",
        )
    require(
        amounts.get("ratio") != 1,
        "alpha_schedule.target.ratio=1: the base itself has its entropy; take a ratio below 1 to "
        "sharpen, or above to flatten",
    )
