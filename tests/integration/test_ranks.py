"""Two ranks over gloo do what one process does: the gradient, the run, and its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from powerflow_lit.automatic_alpha import AutomaticAlpha, EntropyRatio
from powerflow_lit.flow import FlowHead
from powerflow_lit.log_z import EmaLogZ, GroupLogZ, GroupLooLogZ
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.objectives import (
    BalanceObjective,
    BlockVariance,
    PolicyGradientObjective,
    la_tb_mismatch,
)
from powerflow_lit.types import TrajectoryBatch
from tests.commands import command, environment
from tests.faults.faulty import NanObjective
from tests.two_ranks import as_torchrun_starts, on_ranks
from tests.unit.test_automatic_alpha import automatic
from tests.unit.test_module import EQ_10, NO_WEIGHT, batch, head, module

# --- the gradient -------------------------------------------------------------------------------


class Step(nn.Module):
    """What Lightning's strategy calls: the training step as the forward pass of DDP."""

    def __init__(self, trained: PowerFlowModule) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, data: TrajectoryBatch) -> Tensor:
        loss = self.trained.training_step(data, 0)
        assert loss is not None
        return loss


def rl() -> PolicyGradientObjective:
    return PolicyGradientObjective("traj", "in_reward", "rloo", "sequence_sum", NO_WEIGHT)


def blocks(size: int) -> BalanceObjective:
    return BalanceObjective(la_tb_mismatch, NO_WEIGHT, BlockVariance(size))


def by_prompt() -> AutomaticAlpha:
    return automatic(EntropyRatio(ratio=0.9), scope="prompt")


CASES: dict[str, dict[str, Any]] = {
    "head": {"log_z": head},
    "head into the trunk": {"log_z": lambda: head(detach=False, pool="last")},
    "head on the base": {"log_z": lambda: head(source="base")},
    "group": {"log_z": GroupLogZ},
    "leave one out": {"log_z": GroupLooLogZ},
    "ema": {"log_z": lambda: EmaLogZ(rate=0.5, scope="prompt")},
    "rl": {"objective": rl},
    "blocks": {"objective": lambda: blocks(2), "flow": lambda: FlowHead(width=16, detach=True)},
    "blocks into the trunk, longer than most responses": {
        "objective": lambda: blocks(5),
        "flow": lambda: FlowHead(width=16, detach=False),
    },
    "blocks longer than any": {
        "objective": lambda: blocks(50),
        "flow": lambda: FlowHead(width=16, detach=True),
    },
    "an alpha for each prompt": {"log_z": GroupLogZ, "alpha_schedule": by_prompt},
}


def ragged() -> TrajectoryBatch:
    """Three groups of 4, 4 and 2 trajectories: rank 0 takes 4 of them and rank 1 takes 6."""
    data = batch()
    few = torch.arange(10)
    named = {n: getattr(data, n) for n in data.__dataclass_fields__ if n != "tokens"}
    first = {n: None if t is None else t[:10] for n, t in named.items()}
    return TrajectoryBatch(tokens=data.tokens.rows(few), **first)


def made(case: str) -> PowerFlowModule:
    """A module off its base, whose microbatches of 24 tokens hold one to three trajectories."""
    parts = {name: build() for name, build in CASES[case].items()}
    trained = module(tokens=24, **parts)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return trained


def two_updates(case: str, *, wrapped: bool) -> dict[str, Any]:
    """Gradients and metrics of the second update; running log Z and alpha learnt from the first."""
    trained, data = made(case), ragged()
    step: nn.Module = Step(trained)
    reduced: list[int] = []
    if wrapped:
        step = DistributedDataParallel(step, gradient_as_bucket_view=True)
        step.register_comm_hook(reduced, _counting)
    for _ in range(2):
        reduced.clear()
        step.zero_grad()
        step(data).backward()
        trained.end_refill()
    learnt = {} if trained.automatic is None else trained.automatic.metrics
    return {
        "gradient": {
            n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None
        },
        "metrics": {name: float(x) for name, x in {**trained.step_metrics, **learnt}.items()},
        "reduced": sum(reduced),
        "trained": sum(p.numel() for p in trained.parameters()),
    }


def _counting(reduced, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
    """DDP's own reduction, and how many numbers went through it."""
    reduced.append(bucket.buffer().numel())
    buffer = bucket.buffer().div_(torch.distributed.get_world_size())
    work = torch.distributed.all_reduce(buffer, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def every_case() -> dict[str, dict[str, Any]]:
    return {case: two_updates(case, wrapped=True) for case in CASES}


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, dict[str, Any]]]:
    return on_ranks(every_case)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process_on_the_union(
    case: str, on_two: list[dict[str, dict[str, Any]]]
) -> None:
    alone = two_updates(case, wrapped=False)
    for found in (ranks[case] for ranks in on_two):
        assert found["gradient"].keys() == alone["gradient"].keys()
        for name, gradient in alone["gradient"].items():
            assert torch.allclose(found["gradient"][name], gradient, rtol=1e-5, atol=1e-6), name
    largest = max(float(g.abs().max()) for g in alone["gradient"].values())
    assert largest > 1e-3  # of which 1e-6 is little


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_log_the_metrics_of_one_process(
    case: str, on_two: list[dict[str, dict[str, Any]]]
) -> None:
    alone = two_updates(case, wrapped=False)["metrics"]
    assert on_two[0][case]["metrics"] == on_two[1][case]["metrics"]
    assert on_two[0][case]["metrics"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_each_weights_gradient_is_reduced_once_an_update(
    on_two: list[dict[str, dict[str, Any]]],
) -> None:
    for found in on_two[0].values():  # several microbatches each, computed again on the way back
        assert found["reduced"] == found["trained"]


def skipped_then_made() -> dict[str, Any]:
    """An update whose loss is not finite, then one whose loss is."""
    ill = NanObjective(module().objective.mismatch, EQ_10, first=1, last=1)  # type: ignore[attr-defined]
    trained = module(head(), ill, tokens=24)
    trained.print = print  # type: ignore[method-assign]  # there is no Trainer here
    step = DistributedDataParallel(Step(trained))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    before = [p.detach().clone() for p in trained.parameters()]
    kept = []
    for _ in range(2):
        optimizer.zero_grad()
        step(batch()).backward()
        trained.configure_gradient_clipping(optimizer)
        optimizer.step()
        kept.append(all(map(torch.equal, before, trained.parameters())))
    return {"kept": kept, "skipped": trained.skipped_steps, "weights": list(trained.parameters())}


def test_all_ranks_skip_the_same_update_and_make_the_next() -> None:
    first, second = on_ranks(skipped_then_made)
    for found in (first, second):
        assert (found["kept"], found["skipped"]) == ([True, False], 1)
    assert all(map(torch.equal, first["weights"], second["weights"]))


# --- the run ------------------------------------------------------------------------------------

QUICK = (
    "debug=fast", "logger=none", "rollout=hf", "refills=2", "callbacks.evaluation.max_prompts=7",
    "rollout.max_new_tokens=12", "callbacks.checkpoint.keep_previous=false", "model.threads=1",
)  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run twice: `two/...` on two ranks, `one` in one process."""
    folder = tmp_path_factory.mktemp("ranks")
    first, second = as_torchrun_starts(folder, *QUICK, "resume=auto")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "on 2 ranks" in first.stdout
    assert second.stdout == ""  # the first rank talks
    alone = command(
        "powerflow_lit.train", [*QUICK, "run_dir=one"], folder=folder, env=environment(folder)
    )
    assert alone.returncode == 0, alone.stderr
    return folder


@pytest.fixture(scope="module")
def two(runs: Path) -> Path:
    """The folder of the run on two ranks: one, though its name holds the time of day."""
    (found,) = (runs / "outputs" / "arithmetic" / "tiny").glob("*/*/")
    return found


def test_two_ranks_train_as_one_process_does(runs: Path, two: Path) -> None:
    alone, found = rows(runs / "one" / "metrics.csv"), rows(two / "metrics.csv")
    assert len(alone) == len(found) == 5
    for one, other in zip(alone, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            same = one[name] == other[name] or name.startswith("perf/")
            assert same or float(other[name]) == pytest.approx(
                float(one[name]), rel=1e-3, abs=1e-4
            ), name


def test_their_rollouts_together_are_those_of_one_process(runs: Path, two: Path) -> None:
    lines = [
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (runs / "one", two)
    ]
    names = ("refill", "prompt", "response")
    alone, found = ([[row[n] for n in names] for row in rows] for rows in lines)
    assert alone == found
    assert rows(runs / "one" / "problems.csv") == rows(two / "problems.csv")


def test_the_run_folder_is_whole(runs: Path, two: Path) -> None:
    names = [sorted(p.name for p in folder.rglob("*")) for folder in (runs / "one", two)]
    assert names[0] == names[1]
    summaries = [json.loads((f / "summary.json").read_text()) for f in (runs / "one", two)]
    for name in ("status", "refills", "steps", "tokens", "warnings"):
        assert summaries[0][name] == summaries[1][name]
    state = torch.load(two / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["powerflow"]["random_states"]) == 2
    groups = [t["group"] for t in state["RolloutDataModule"]["buffer"]["refills"][1]]
    assert sorted(set(groups)) == [4, 5, 6, 7]  # of both ranks


def test_another_number_of_ranks_is_refused_unless_forced(runs: Path, two: Path) -> None:
    def resumed(*more: str) -> Any:
        chosen = [*QUICK, f"resume={two}", "refills=3", *more]
        env = environment(runs)
        return command("powerflow_lit.train", chosen, folder=runs, env=env)

    before = (two / "metrics.csv").read_text()
    (two / "overrides.yaml").write_text("[]\n")  # what was typed there named the ranks
    refused = resumed()
    assert refused.returncode == 2
    assert "it ran on 2 ranks, now 1" in refused.stderr
    assert (two / "metrics.csv").read_text() == before
    forced = resumed("resume_force=true")
    assert forced.returncode == 0, forced.stderr
    assert rows(two / "metrics.csv")[-1]["refill"] == "3"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.prompts_per_refill=3", "buffer.updates_per_refill=1"],
         "rollout.prompts_per_refill=3 is not divisible by the 2 ranks of trainer.devices=2"),
        (["rollout.prompts_per_refill=6", "buffer.updates_per_refill=2"],
         "rollout.prompts_per_refill / buffer.updates_per_refill=3 is not divisible by the 2"),
        (["buffer.prompts_per_update=1"], "buffer.prompts_per_update=1 is not divisible"),
        (["trainer.num_nodes=2"], "Lightning starts processes on this machine only"),
        (["trainer.strategy=ddp_spawn"], "take trainer=ddp"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_share_a_run_are_refused(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    chosen = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", *QUICK, *overrides]
    found = command("powerflow_lit.train", chosen, folder=tmp_path, env=environment(tmp_path))
    assert found.returncode == 2
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "outputs").exists()
