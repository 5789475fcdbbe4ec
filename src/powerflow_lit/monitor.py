"""Rules over logged metrics (`monitor=`) that warn, stop the run or pull alpha towards 1."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from powerflow_lit.checkpoints import GOOD, PREVIOUS, link
from powerflow_lit.health import RunWarning
from powerflow_lit.mendable import MendableError
from powerflow_lit.module import PowerFlowModule

Action = Literal["warn", "stop", "pull"]
Relative = Literal["factor", "difference"]


class MonitorError(MendableError, ValueError):
    """A rule watches what the run never logs; the message names what is near."""


@dataclass(frozen=True)
class Rule:
    """Bounds on a metric, in its own units; values stand in `conf/monitor/`."""

    name: str
    metric: str
    action: Action
    patience: int  # refills in a row in which it must be broken before the action
    above: float | None  # broken above this
    below: float | None  # broken below this
    relative: Relative | None  # bounds as a factor of, or difference to, the first refill's value
    hint: str  # what a break probably means and what to try

    def broken_bound(self, value: float, first: float) -> str | None:
        """The bound that a refill's value breaks, in words; None if it keeps them all.

        A value that is not a number breaks every bound.
        """
        for side, bound in (("above", self.above), ("below", self.below)):
            if bound is None:
                continue
            limit = self._limit(bound, first)
            if not (value <= limit if side == "above" else value >= limit):
                return f"{side} {limit:.4g}{self._origin(bound, first)}"
        return None

    def _limit(self, bound: float, first: float) -> float:
        if self.relative is None:
            return bound
        return bound * first if self.relative == "factor" else first + bound

    def _origin(self, bound: float, first: float) -> str:
        if self.relative is None:
            return ""
        sum_or_product = f"{bound:g} x" if self.relative == "factor" else f"{bound:+g} to"
        return f" ({sum_or_product} the first refill's {first:.4g})"


@dataclass
class Watch:
    """A rule as it goes through a run, one refill after the other."""

    rule: Rule
    first: float | None = None  # the metric's value at the first refill
    streak: int = 0  # refills in a row in which the rule was broken
    finding: str = ""  # of the last refill judged

    def judge(self, value: float) -> bool:
        """Takes a refill's value; whether the rule's patience is at an end."""
        if self.first is None:
            self.first = value
        bound = self.rule.broken_bound(value, self.first)
        self.streak = 0 if bound is None else self.streak + 1
        refills = "1 refill" if self.streak == 1 else f"{self.streak} refills in a row"
        self.finding = (
            f"monitor rule {self.rule.name}: {self.rule.metric} is {value:.4g}, {bound}, "
            f"for {refills}. {self.rule.hint}"
        )
        return self.streak >= self.rule.patience

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.rule.metric, "first": self.first, "streak": self.streak}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["metric"] == self.rule.metric:  # else a resumed run gave the name to another
            self.first, self.streak = state["first"], state["streak"]


def next_pull(pull: float, broken: bool, *, factor: float, recovery: float) -> float:
    """Share of alpha - 1 that the next refill uses: shrinks while a rule is broken, else recovers.

    It stays in (0, 1]; in the limit alpha is 1, at which the base itself is the target.
    """
    return pull * factor if broken else min(pull + recovery, 1.0)


class Recorder(Logger):
    """Keeps what is logged, from any callback, until it is taken at the end of a refill."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()  # every metric since the start of the run
        self.values: dict[str, list[float]] = {}

    @property
    def name(self) -> str:
        return "monitor"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: only metrics are watched."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(float(value))
        self.seen |= metrics.keys()

    def take(self) -> dict[str, float]:
        """Means of what was logged since the last time, by metric."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values = {}
        return means


class Monitor(Callback):
    """Judges the rules at the end of each refill, before the checkpoint of that refill is written.

    A metric that a refill does not log (`val/...` between evaluations) leaves its rules as they
    are. With a `stop` rule, `good.ckpt` beside the checkpoint holds the newest one whose rollouts
    kept all stop rules: a policy's rollouts are seen only a refill after its checkpoint. On a stop
    it takes the place of the checkpoint.

    Attributes:
        stopped_by: why the run was stopped; None while it was not.
        warnings: what was printed, with its refill.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        pull_factor: float,
        pull_recovery: float,
        checkpoint: Path,
    ) -> None:
        self.watches = [Watch(rule) for rule in rules]
        self.pull_factor, self.pull_recovery = pull_factor, pull_recovery
        self.checkpoint, self.good = checkpoint, checkpoint.with_name(GOOD)
        self.candidate = checkpoint.with_name("candidate.ckpt")
        self.stopped_by: str | None = None
        self.warnings: list[RunWarning] = []
        self._recorder = Recorder()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.loggers = [*trainer.loggers, self._recorder]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._recorder.take()  # the base's evaluation is of no refill

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stops = any(w.rule.action == "stop" for w in self.watches)
        if stops and trainer.is_global_zero:  # of the policy that this refill's rollouts are from
            self.candidate.unlink(missing_ok=True)
            link(self.checkpoint, self.candidate)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PowerFlowModule)
        values = self._recorder.take()
        self._refuse_unknown()
        judged = [w for w in self.watches if w.rule.metric in values]
        broken = [w for w in judged if w.judge(values[w.rule.metric])]
        self._pull(pl_module, judged, broken)
        for watch in broken:
            if watch.rule.action != "stop" and watch.streak == watch.rule.patience:
                pulled = "; alpha is pulled towards 1" if watch.rule.action == "pull" else ""
                pl_module.print(f"warning: {watch.finding}{pulled}")
                refill = trainer.current_epoch + 1
                self.warnings.append(RunWarning(refill, f"{watch.finding}{pulled}"))
        self._stop(trainer, pl_module, [w for w in broken if w.rule.action == "stop"])

    def _refuse_unknown(self) -> None:
        for rule in (w.rule for w in self.watches):
            if rule.metric in self._recorder.seen:
                continue
            seen = sorted(self._recorder.seen)
            near = difflib.get_close_matches(rule.metric, seen, n=3, cutoff=0.4)
            raise MonitorError(
                f"monitor.rules.{rule.name}.metric={rule.metric}: this run does not log it; near: "
                f"{', '.join(near) or 'nothing'} (~monitor.rules.{rule.name} takes the rule away)"
            )

    def _pull(
        self, module: PowerFlowModule, judged: Sequence[Watch], broken: Sequence[Watch]
    ) -> None:
        if any(w.rule.action == "pull" for w in judged):
            module.alpha_pull = next_pull(
                module.alpha_pull,
                any(w.rule.action == "pull" for w in broken),
                factor=self.pull_factor,
                recovery=self.pull_recovery,
            )

    def _stop(self, trainer: L.Trainer, module: PowerFlowModule, broken: Sequence[Watch]) -> None:
        stops = [w for w in self.watches if w.rule.action == "stop"]
        if broken:
            self.stopped_by = "\n".join(w.finding for w in broken)
            trainer.should_stop = True
            if trainer.is_global_zero and self.good.exists():
                os.replace(self.good, self.checkpoint)
                for newer in (self.checkpoint.with_name(PREVIOUS), self.candidate):
                    newer.unlink(missing_ok=True)  # and not good
            module.print(f"stopped at refill {trainer.current_epoch + 1}: {self.stopped_by}")
        elif stops and all(w.streak == 0 for w in stops) and trainer.is_global_zero:
            link(self.candidate, self.good)

    def state_dict(self) -> dict[str, Any]:
        return {
            "watches": {w.rule.name: w.state_dict() for w in self.watches},
            "seen": sorted(self._recorder.seen),
            "values": self._recorder.values,
            "warnings": [[w.refill, w.text] for w in self.warnings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorder.seen |= set(state_dict["seen"])
        self._recorder.values = state_dict.get("values", {})  # of a refill that was broken off
        self.warnings = [RunWarning(*w) for w in state_dict.get("warnings", [])]
        for watch in self.watches:
            if watch.rule.name in state_dict["watches"]:
                watch.load_state_dict(state_dict["watches"][watch.rule.name])
