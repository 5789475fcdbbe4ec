"""What the paper says of its targets, on many random bases; and LA-TB over blocks beside LA-TB.

python experiments/theory/run.py [--output DIR] [--bases N] [--steps N] [--seeds N]

Writes targets.csv, blocks.csv, noise.csv, run.json and the figures. See README.md beside this file
for what was found.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from figures import BLOCKS, KINDS, blocks_table, draw, noise_table, targets_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from powerflow_lit.enumerable import Language, exact_inversion_rate, kl, total_variation
from powerflow_lit.enumerable_training import (
    FlowTable,
    LearnedScalar,
    Recipe,
    inputs_for,
    own_samples,
    training,
)
from powerflow_lit.objectives import (
    BalanceObjective,
    BlockVariance,
    ImportanceWeight,
    la_tb_mismatch,
)
from powerflow_lit.run_folder import git_commit, versions

CAP = 8  # tokens: 511 strings of two letters and the end symbol
ALPHAS = (0.25, 0.5, 0.7, 0.85, 0.93, 0.97, 1.0, 1.03, 1.07, 1.15, 1.3, 1.6, 2.0, 3.0, 4.0, 6.0,
          8.0, 16.0, 32.0)  # fmt: skip
# what a base's end symbol has in logits beyond the other symbols
END = {"plain": 0.0, "rare end": -2.0}
TRAINED = (0.5, 2.0, 4.0)  # alphas that are trained for
TRAINED_BASES = (1, 3)
LOOKS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RATES = (0.02, 0.1)  # policy; log Z' and log V
UNWEIGHTED = ImportanceWeight("none", None, None)
KEYS = ("kind", "alpha", "bases")  # of a row of targets.csv
Row = dict[str, Any]


# --- targets -------------------------------------------------------------------------------------


def base_of(language: Language, kind: str, seed: int) -> Tensor:
    """A bigram table of standard normal logits, (prefixes, V)."""
    logits = language.bigram_base(seed)
    shift = torch.zeros(logits.shape[1], dtype=torch.float64)
    shift[-1] = END[kind]
    return logits + shift


def targets_of(language: Language, kind: str, seed: int) -> Iterator[Row]:
    """One base: what its targets are for every alpha."""
    base, L = base_of(language, kind, seed), language.lengths
    B = language.log_probs(base)
    mode, best = int(B.argmax()), int((B / L).argmax())

    def expected(log_p: Tensor, x: Tensor) -> float:
        return float((log_p.exp() * x).sum())

    for alpha in ALPHAS:
        power, _ = language.power_target(base, alpha)
        target, price = language.length_averaged_target(base, alpha)
        tempered = language.log_probs(alpha * base.log_softmax(-1))
        variance = expected(power, L**2) - expected(power, L) ** 2
        yield {
            "kind": kind,
            "base": seed,
            "alpha": alpha,
            "log_z": price,
            "length_base": expected(B, L),
            "length_power": expected(power, L),
            "length_la_tb": expected(target, L),
            "cut_la_tb": float(target.exp()[L == CAP].sum()),
            "distortion_formula": 0.5 * price**2 * variance,
            "distortion": kl(target, power),
            "inversion_la_tb": exact_inversion_rate(target, B, target),
            "inversion_tempered": exact_inversion_rate(tempered, B, tempered),
            "mode_power": float(power[mode].exp()),
            "mode_la_tb": float(target[mode].exp()),
            "best_la_tb": float(target[best].exp()),
            "mode_is_best": int(mode == best),
            "tv_tempered_la_tb": total_variation(tempered, target),
            "tv_power_la_tb": total_variation(power, target),
        }


def summarised(rows: Sequence[Row]) -> list[Row]:
    """Quartiles over the bases for each kind and alpha; all rows would be a megabyte."""
    found: list[Row] = []
    for kind in KINDS:
        for alpha in ALPHAS:
            of = [r for r in rows if r["kind"] == kind and r["alpha"] == alpha]
            row: Row = {"kind": kind, "alpha": alpha, "bases": len(of)}
            row["lengthened"] = mean(r["length_la_tb"] > r["length_base"] for r in of)
            row["mode_is_best"] = mean(r["mode_is_best"] for r in of)
            for name in of[0].keys() - {"kind", "base", "alpha", "mode_is_best"}:
                values = torch.tensor([r[name] for r in of], dtype=torch.float64)
                for share, label in ((0.25, "q25"), (0.5, "median"), (0.75, "q75")):
                    row[f"{name}_{label}"] = float(values.quantile(share))
            found.append(dict(sorted(row.items(), key=lambda item: (item[0] not in KEYS, item[0]))))
    return found


# --- blocks --------------------------------------------------------------------------------------


def objective_of(block_size: int) -> BalanceObjective:
    """LA-TB where a block holds any response."""
    spread = None if block_size >= CAP else BlockVariance(block_size)
    return BalanceObjective(la_tb_mismatch, UNWEIGHTED, spread)


def trained(
    language: Language, seed: int, base_seed: int, alpha: float, block_size: int, steps: int
) -> Iterator[Row]:
    """One training on own samples; rows at the looks."""
    base = base_of(language, "plain", base_seed)
    target, exact_z = language.length_averaged_target(base, alpha)
    flow = FlowTable(language, block_size) if block_size < CAP else None
    recipe = Recipe(steps, *RATES, samples=128)
    batch = own_samples(language, base, recipe, seed=seed, flow=flow)
    objective = partial(objective_of(block_size), alpha=alpha)
    looks = {round(share * steps) for share in LOOKS}
    exact = language.prefix_flow(base, alpha)
    lengths = language.prefix_lengths
    used = (lengths > 0) & (lengths % block_size == 0)
    for step in training(base, objective, flow or LearnedScalar(), recipe, batch):
        if step.number in looks:
            yield {
                "base": base_seed,
                "alpha": alpha,
                "block_size": block_size,
                "seed": seed,
                "step": step.number,
                "total_variation": total_variation(language.log_probs(step.logits), target),
                "log_z_error": abs(step.log_z - exact_z),
                "flow_error": float((flow.table.detach() - exact)[used].abs().mean())
                if flow
                else None,
            }


def noise_of(
    language: Language, base_seed: int, alpha: float, block_size: int, flow_at: str, at: str
) -> Row:
    """How much a response's gradient varies about the mean one, exactly, by enumeration.

    log Z' is exact. Trace of the covariance over the squared mean, of the gradient in the logits.
    """
    base = base_of(language, "plain", base_seed)
    target, log_z = language.length_averaged_target(base, alpha)
    logits = base.log_softmax(-1)
    if at == "half-way":
        logits = 0.5 * (logits + language.logits_of(target).log_softmax(-1))
    flow = FlowTable(language, block_size) if block_size < CAP else None
    if flow is not None and flow_at == "exact":
        flow.table.data = language.prefix_flow(base, alpha)
    inputs = inputs_for(language, logits, base, log_z=log_z, flow=flow)
    log_pf = inputs.log_pf.clone().requires_grad_()
    loss = objective_of(block_size)(replace(inputs, log_pf=log_pf), alpha=alpha).loss
    # a string's loss hangs on its own tokens alone; of a token's log-prob the logits of one prefix
    by_token = torch.autograd.grad(loss, log_pf)[0] * len(language)  # (N, T)
    chosen = torch.nn.functional.one_hot(language.token, language.symbols)
    by_logit = by_token[..., None] * (chosen - logits.softmax(-1)[language.prefix])  # (N, T, V)
    rows = torch.arange(len(language))[:, None].expand_as(language.mask)
    each = torch.zeros(len(language), *logits.shape, dtype=torch.float64)
    each = each.index_put((rows, language.prefix), by_logit, accumulate=True).flatten(1)
    chances = language.log_probs(logits).exp()
    average = chances @ each
    return {
        "base": base_seed,
        "alpha": alpha,
        "block_size": block_size,
        "flow": flow_at,
        "at": at,
        "noise": float(chances @ (each - average).square().sum(1)) / float(average.square().sum()),
    }


# --- the command ---------------------------------------------------------------------------------


def write_rows(rows: Sequence[Row], path: Path) -> None:
    def cell(value: Any) -> Any:
        return f"{value:.5g}" if isinstance(value, float) else value

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: cell(v) for k, v in row.items()} for row in rows)


def progressed(title: str, jobs: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    with bar:
        task = bar.add_task(title, total=len(jobs))
        for job in jobs:
            yield job()
            bar.advance(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--bases", type=int, default=200, help="random bases of each kind")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of a training")
    parser.add_argument("--seeds", type=int, default=3, help="of the trainings")
    options = parser.parse_args()
    if min(options.bases, options.steps, options.seeds) < 1:
        parser.error("--bases, --steps and --seeds must be at least 1")
    torch.set_num_threads(1)  # tensors are small, and sums keep their order
    options.output.mkdir(parents=True, exist_ok=True)
    language, start = Language.build(cap=CAP), time.perf_counter()

    def every(title: str, jobs: Sequence[Callable[[], Any]]) -> list[Row]:
        return [row for rows in progressed(title, jobs) for row in rows]

    targets = every("targets", [
        partial(list, targets_of(language, kind, seed))
        for kind in KINDS for seed in range(options.bases)
    ])  # fmt: skip
    blocks = every("trainings", [
        partial(list, trained(language, seed, base, alpha, size, options.steps))
        for base in TRAINED_BASES for alpha in TRAINED for size in BLOCKS
        for seed in range(options.seeds)
    ])  # fmt: skip
    noise = list(progressed("gradients", [
        partial(noise_of, language, base, alpha, size, flow, at)
        for base in TRAINED_BASES for alpha in TRAINED for at in ("start", "half-way")
        for size in BLOCKS for flow in ("zero", "exact")
        if size < CAP or flow == "zero"
    ]))  # fmt: skip
    wall = time.perf_counter() - start

    write_rows(summarised(targets), options.output / "targets.csv")
    write_rows(blocks, options.output / "blocks.csv")
    write_rows(noise, options.output / "noise.csv")
    about = {
        "command": "python experiments/theory/run.py"
        f" --bases {options.bases} --steps {options.steps} --seeds {options.seeds}",
        "git_commit": git_commit(),
        "versions": versions(),
        "cap": CAP,
        "end_logits": END,
        "rates": RATES,
        "wall_s": round(wall, 1),
    }
    (options.output / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(targets, blocks, options.output)
    print(targets_table(targets), blocks_table(blocks), noise_table(noise), sep="\n")
    print(f"{wall:.0f} s; written to {options.output}")


if __name__ == "__main__":
    main()
