"""How near does every objective come to its exact target, and when does it not?

python experiments/exactness/run.py [--output DIR] [--steps N] [--seeds N]

Writes results.csv, run.json and the figures. See README.md beside this file for what was found.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from figures import SAMPLED, draw, final_table, frozen_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import (
    Batch,
    Frozen,
    LearnedScalar,
    Objective,
    Recipe,
    Step,
    inputs_for,
    own_samples,
    training,
)
from powerflow_lit.objectives import (
    BalanceObjective,
    ImportanceWeight,
    LossInputs,
    PolicyGradientObjective,
    la_tb_mismatch,
    tb_token_mismatch,
    tb_traj_mismatch,
)
from powerflow_lit.objectives.policy_gradient import Energy
from powerflow_lit.objectives.weights import WeightKind, Weights
from powerflow_lit.run_folder import git_commit, versions

ALPHAS = (0.5, 2.0, 4.0)
BASE = 1  # seed of the base that the curves are drawn for
BASES = range(8)  # the frozen case alone is repeated on all of them
EPSILON = 0.2
GROUP = 8  # rollouts of a group
# shares of a run at which it is looked at, dense where the curves are steep
LOOKS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

BALANCE = ("powerflow", "la_tb", "tb_traj", "tb_token", "tb_token_power")
RL: dict[str, Energy] = {"rl_traj": "traj", "rl_token": "token"}
RATES = {  # (policy, log Z)
    "enumerated": (0.1, 0.3),
    "samples": (0.02, 0.1),
    "fast": (0.5, 0.01),
}
COLUMNS = (
    "objective", "alpha", "sampling", "variant", "base", "seed", "step", "total_variation",
    "total_variation_to_tilt", "loss", "log_z", "log_z_exact", "residual_std_on_base",
)  # fmt: skip
Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        sampling: `uniform` and `base` weigh all strings equally or by the base, `policy` by the
            policy (the exact on-policy gradient); `samples` draws them from the policy.
        variant: `fast` has a high learning rate of the policy and a low one of log Z'; `log_z=0`
            freezes log Z' there.
    """

    objective: str
    alpha: float
    sampling: str
    seed: int = 0
    variant: str = ""
    base: int = BASE

    def recipe(self, steps: int) -> Recipe:
        kind = "samples" if self.sampling == SAMPLED else "enumerated"
        lr, lr_z = RATES["fast" if self.variant == "fast" else kind]
        return Recipe(steps, lr, lr_z, samples=256, updates_per_refill=2)


def cases(seeds: int) -> list[Case]:
    found = []
    for alpha in ALPHAS:
        for name in BALANCE:
            found += [Case(name, alpha, sampling) for sampling in ("uniform", "base")]
        rl = RL if alpha > 1 else {}  # beta = 1 / (alpha - 1) must be positive
        found += [Case(name, alpha, "policy") for name in rl]
        found += [Case(name, alpha, SAMPLED, s) for name in (*BALANCE, *rl) for s in range(seeds)]
        found += [Case("la_tb", alpha, "policy", variant="log_z=0")]
        found += [Case("la_tb", alpha, SAMPLED, s, "log_z=0") for s in range(seeds)]
    found += [Case("la_tb", 4.0, SAMPLED, s, "fast", b) for b in BASES for s in range(seeds)]
    found += [Case("la_tb", 4.0, SAMPLED, 0, "", b) for b in BASES if b != BASE]
    return found


# --- what is trained, and towards what -----------------------------------------------------------


@dataclass(frozen=True)
class Weighted(ImportanceWeight):
    """Turns the mean over all strings into an expectation under fixed chances."""

    chances: Tensor  # (N,)

    def __call__(self, inputs: LossInputs) -> Weights:
        weights = super().__call__(inputs)
        return replace(weights, value=weights.value * self.chances * len(self.chances))


@dataclass(frozen=True)
class Bench:
    """The language with one base, and what depends on both."""

    language: Language
    base: Tensor  # (prefixes, V) logits
    chances: Tensor  # (N,) of every string under the base

    @classmethod
    def build(cls, language: Language, seed: int) -> Bench:
        base = language.bigram_base(seed)
        return cls(language, base, language.log_probs(base).exp())

    @property
    def mean_length(self) -> float:
        return float((self.chances * self.language.lengths).sum())

    def target(self, name: str, alpha: float) -> tuple[Tensor, float]:
        """Exact log-probs (N,) and log Z, by enumeration alone."""
        language, base = self.language, self.base
        if name in ("powerflow", "la_tb"):
            return language.length_averaged_target(base, alpha)
        if name in ("tb_traj", "rl_traj"):
            return language.power_target(base, alpha)
        if name == "tb_token_power":
            return language.averaged_power_target(base, alpha)
        scale = self.mean_length if name == "tb_token" else 1.0
        return language.token_target(base, scale * (alpha - 1.0))

    def objective(self, name: str, alpha: float, sampling: str) -> Objective:
        """As a strategy assembles it; only the weight depends on where the strings come from."""
        weight = self._weight(name, sampling)
        if name in RL:
            reward = RL[name]
            gradient = PolicyGradientObjective(reward, "in_reward", "rloo", "sequence_sum", weight)
            return partial(gradient, alpha=alpha)
        mismatch: Callable[..., Tensor] = la_tb_mismatch
        if name == "tb_traj":
            mismatch = tb_traj_mismatch
        elif name == "tb_token":
            mismatch = partial(tb_token_mismatch, scale=self.mean_length, reading="energy")
        elif name == "tb_token_power":
            mismatch = partial(tb_token_mismatch, scale=1.0, reading="power")
        return partial(BalanceObjective(mismatch, weight), alpha=alpha)

    def _weight(self, name: str, sampling: str) -> ImportanceWeight:
        if sampling == "policy":  # N pi(y): the mean over all strings is E_pi
            return ImportanceWeight("seq_sum", None, None)
        eq_10 = name == "powerflow"
        kind: WeightKind = "seq_sum" if eq_10 else "none"
        clip = EPSILON if eq_10 else None
        if sampling == "base":
            return Weighted(kind, clip, clip, self.chances)
        return ImportanceWeight(kind, clip, clip)

    def batch(self, case: Case, recipe: Recipe) -> Batch:
        if case.sampling == SAMPLED:
            return own_samples(self.language, self.base, recipe, seed=case.seed, group=GROUP)
        of_base = self.language.token_log_probs(self.base)
        old = of_base if case.sampling == "base" else None  # None: uniform
        return lambda logits, step: inputs_for(self.language, logits, self.base, log_p_old=old)

    def residual_std(self, objective: Objective, logits: Tensor) -> float:
        """Of the residual over the base's own strings, exactly; log Z only shifts it."""
        residual = objective(inputs_for(self.language, logits, self.base)).residual
        mean = (self.chances * residual).sum()
        return float((self.chances * (residual - mean).square()).sum().sqrt())


def looked_at(case: Case, bench: Bench, steps: int) -> Iterator[Row]:
    """Trains one case; rows at the looks."""
    language = bench.language
    target, exact_z = bench.target(case.objective, case.alpha)
    tilt = None
    if case.variant == "log_z=0":
        tilt, exact_z = language.frozen_zero_target(bench.base, case.alpha), 0.0
    objective = bench.objective(case.objective, case.alpha, case.sampling)
    plain = bench.objective(case.objective, case.alpha, "uniform")
    learned = case.objective not in RL and case.variant != "log_z=0"
    recipe = case.recipe(steps)

    def row(step: Step) -> Row:
        log_p = language.log_probs(step.logits)
        return {
            "objective": case.objective,
            "alpha": case.alpha,
            "sampling": case.sampling,
            "variant": case.variant,
            "base": case.base,
            "seed": case.seed,
            "step": step.number,
            "total_variation": total_variation(log_p, target),
            "total_variation_to_tilt": None if tilt is None else total_variation(log_p, tilt),
            "loss": None if case.objective in RL else step.loss,  # of RL only the slope counts
            "log_z": step.log_z if learned else None,
            "log_z_exact": exact_z if learned else None,
            "residual_std_on_base": bench.residual_std(plain, step.logits),
        }

    looks = {round(share * steps) for share in LOOKS}
    if case.base != BASE:
        looks = {0, steps}
    log_z = LearnedScalar() if learned else Frozen(0.0)
    for step in training(bench.base, objective, log_z, recipe, bench.batch(case, recipe)):
        if step.number in looks:
            yield row(step)


# --- the command ---------------------------------------------------------------------------------


def write_rows(rows: list[Row], path: Path) -> None:
    def cell(value: str | int | float | None) -> str | int | None:
        return f"{value:.4g}" if isinstance(value, float) else value

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: cell(v) for k, v in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of a training")
    parser.add_argument("--seeds", type=int, default=3, help="of the sampled trainings")
    options = parser.parse_args()
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    torch.set_num_threads(1)  # tensors are tiny, and sums keep their order
    options.output.mkdir(parents=True, exist_ok=True)

    language = Language.build()
    benches = {seed: Bench.build(language, seed) for seed in BASES}
    todo, rows, start = cases(options.seeds), list[Row](), time.perf_counter()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    with bar:
        task = bar.add_task("trainings", total=len(todo))
        for case in todo:
            rows += looked_at(case, benches[case.base], options.steps)
            bar.advance(task)
    wall = time.perf_counter() - start

    write_rows(rows, options.output / "results.csv")
    about = {
        "command": "python experiments/exactness/run.py"
        f" --steps {options.steps} --seeds {options.seeds}",
        "git_commit": git_commit(),
        "versions": versions(),
        "steps": options.steps,
        "seeds": options.seeds,
        "rates": RATES,
        "mean_length": round(benches[BASE].mean_length, 4),
        "wall_s": round(wall, 1),
    }
    (options.output / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(rows, options.output)
    print(final_table(rows), frozen_table(rows), sep="\n")
    print(f"{len(todo)} trainings in {wall:.0f} s; written to {options.output}")


if __name__ == "__main__":
    main()
