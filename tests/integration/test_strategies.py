"""Every strategy trains, and only the supervised ones can be led astray by a reference answer."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from powerflow_lit.assembly import build_datamodule, build_module, build_policy, wandb_tags
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.config.rules import ConfigError
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.objectives import BalanceObjective, PolicyGradientObjective, RewardObjective
from powerflow_lit.preflight import light_parts
from powerflow_lit.rewards import RewardError
from powerflow_lit.tasks.arithmetic import Arithmetic
from powerflow_lit.types import Prompt, Trajectory
from tests.commands import command, environment

STRATEGIES = sorted(path.stem for path in Path(conf_dir(), "strategy").glob("*.yaml"))
RIVALS = ("grpo", "dr_grpo", "intuitor", "empo", "ttrl", "one_shot_em", "flowrl",
          "flowrl_unclipped", "format_only")  # fmt: skip
SUPERVISED = ("grpo", "dr_grpo", "flowrl", "flowrl_unclipped")
BALANCE = ("powerflow", "powerflow_length", "la_tb", "la_tb_blocks", "tb_traj", "tb_token",
           "tb_token_per_token", "format_only", "flowrl", "flowrl_unclipped")  # fmt: skip
REWARDED = ("grpo", "dr_grpo", "intuitor", "empo", "ttrl")
HERE = "tests.integration.test_strategies"
ASKS_FOR = {"powerflow_length": ["length_control=target"]}


class TouchedError(AssertionError):
    """Somebody looked at a reference answer."""


class PoisonedPrompt(Prompt):
    def __getattribute__(self, name: str) -> Any:
        if name == "reference":
            raise TouchedError
        return super().__getattribute__(name)


class Poisoned(Arithmetic):
    """Its references raise when looked at, and there is no probe of correctness to look at them."""

    def train_prompts(self) -> Sequence[Prompt]:
        return [PoisonedPrompt(p.id, p.text, p.reference) for p in super().train_prompts()]

    def is_correct(self, prompt: Prompt, response: str) -> bool | None:
        return None


class Wrong(Arithmetic):
    """All references are replaced by one that nothing matches; the probe looks at them."""

    def train_prompts(self) -> Sequence[Prompt]:
        return [replace(p, reference="none of these") for p in super().train_prompts()]


@cache
def config(strategy: str, *more: str, task: str | None = None) -> TrainConfig:
    own = [f"task.build._target_={HERE}.{task}"] if task else []
    own += ASKS_FOR.get(strategy, [])
    few = ["rollout.prompts_per_refill=4", "rollout.samples_per_prompt=4", "refills=1",
           "rollout.max_new_tokens=32", "model.threads=1", "optimizer.lr=1e-3",
           "task.build.train_size=16", "task.build.eval_size=2"]  # fmt: skip
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        overrides = [f"strategy={strategy}", "rollout=hf", "alpha=2", "run_dir=x", *few, *own]
        return train_config(compose("train", [*overrides, *more]))


def trained(chosen: TrainConfig) -> tuple[Tensor, list[Trajectory]]:
    """All weights after one refill and two updates, and what was trained on."""
    L.seed_everything(0, verbose=False)
    policy, tokenizer = build_policy(chosen)
    module = build_module(chosen, policy, instantiate(chosen.strategy.objective))
    data = build_datamodule(chosen, instantiate(chosen.task.build), tokenizer, PhaseClock())
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data)
    finally:
        data.close()
    assert (module.global_step, module.skipped_steps) == (2, 0)
    weights = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    return weights, list(data.buffer)


@cache
def base_weights() -> Tensor:
    policy, _ = build_policy(config("powerflow"))
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_these_are_all_strategies() -> None:
    assert set(RIVALS) | set(BALANCE) | {"rl_traj", "rl_token"} == set(STRATEGIES)
    assert {s for s in STRATEGIES if config(s).strategy.supervised} == set(SUPERVISED)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - set(SUPERVISED)))
def test_an_unsupervised_strategy_trains_without_a_look_at_any_reference(strategy: str) -> None:
    poisoned, rollouts = trained(config(strategy, task="Poisoned"))
    assert not torch.equal(poisoned, base_weights())
    assert all(t.correct is None for t in rollouts)
    with_reward = config(strategy).strategy.reward is not None
    assert all((t.reward is not None) == with_reward for t in rollouts)


@pytest.mark.parametrize("strategy", ["powerflow", "intuitor", "empo", "ttrl"])
def test_nor_does_the_probe_of_correctness_change_a_weight(strategy: str) -> None:
    wrong, rollouts = trained(config(strategy, task="Wrong"))
    assert [t.correct for t in rollouts] == [False] * len(rollouts)
    assert torch.equal(wrong, trained(config(strategy))[0])


@pytest.mark.parametrize("strategy", SUPERVISED)
def test_a_supervised_strategy_does_learn_from_the_references(strategy: str) -> None:
    """Otherwise the test above could not fail."""
    true, rollouts = trained(config(strategy))
    assert not torch.equal(true, trained(config(strategy, task="Wrong"))[0])
    assert [t.reward for t in rollouts] == [float(bool(t.correct)) for t in rollouts]
    assert {t.reward for t in rollouts} == {0.0, 1.0}
    with pytest.raises(RewardError, match=r"a supervised strategy needs references, and prompt"):
        trained(config(strategy, task="Poisoned"))


def test_wandb_tags_say_what_is_supervised_and_where_alpha_counts() -> None:
    tags = {s: wandb_tags(config(s)) for s in ("powerflow", "grpo", "intuitor")}
    assert {s for s in tags if "supervised" in tags[s]} == {"grpo"}
    assert {s for s in tags if "alpha=2" in tags[s]} == {"powerflow"}
    assert all(tags[s][0] == s for s in tags)


@pytest.mark.parametrize("reads", ["[]", "[answer_class]", "[self_certainty]"])
def test_a_reward_cannot_read_what_its_strategy_does_not_name(reads: str) -> None:
    chosen = config("grpo", "strategy.supervised=false", f"strategy.reward.reads={reads}")
    with pytest.raises(ConfigError, match=r"uses correct: name it in strategy\.reward\.reads"):
        light_parts(chosen)


def test_of_the_votes_of_a_majority_a_share_is_trained_on() -> None:
    _, rollouts = trained(config("ttrl"))
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in rollouts:
        groups.setdefault(trajectory.group, []).append(trajectory)
    assert [len(group) for group in groups.values()] == [2] * 4
    everyone = trained(config("ttrl", "strategy.reward.trained_share=1"))[1]
    assert [t.response_ids for t in rollouts] == [
        t.response_ids for i, t in enumerate(everyone) if i % 4 < 2
    ]
    # the votes of all four count, also in the rewards of the two
    assert [t.reward for t in rollouts] == [t.reward for i, t in enumerate(everyone) if i % 4 < 2]


def test_intuitors_reward_is_the_certainty_of_the_policy_that_sampled() -> None:
    chosen = config("intuitor")
    _, rollouts = trained(chosen)
    L.seed_everything(0, verbose=False)
    base = build_policy(chosen)[0]
    for trajectory in rollouts[:5]:
        row = [*trajectory.prompt_ids, *trajectory.response_ids]
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([row])).logits[0].double()
        logits = logits[len(trajectory.prompt_ids) - 1 : -1]
        certainty = (logits.logsumexp(-1) - logits.mean(-1)).mean()
        assert trajectory.reward == pytest.approx(float(certainty), abs=1e-4)


def test_strategies_share_one_path_for_the_residual_and_one_for_the_advantage() -> None:
    kinds = {s: type(instantiate(config(s).strategy.objective)) for s in STRATEGIES}
    assert {s for s, kind in kinds.items() if kind is BalanceObjective} == set(BALANCE)
    assert {s for s, kind in kinds.items() if kind is RewardObjective} == set(REWARDED)
    assert {s for s, k in kinds.items() if k is PolicyGradientObjective} == {"rl_traj", "rl_token"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy=ttrl", "task=creative"), "compares the answers.*task=creative has none"),
        (("strategy=empo", "strategy.reward.function.gate=all"), "strategy=empo: 'all' is none of"),
        (("strategy=flowrl", "strategy.objective.mismatch.scale=0"), "flowrl scale=0"),
        (("strategy=grpo", "strategy.objective.kl=-1"), "kl=-1"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(
    overrides: tuple[str, ...], message: str
) -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        chosen = train_config(compose("train", [*overrides, "rollout=hf"]))
    with pytest.raises(ConfigError, match=message):
        light_parts(chosen)


def test_a_supervised_strategy_without_references_is_refused_before_a_model_loads() -> None:
    with pytest.raises(ConfigError, match=r"strategy=grpo is supervised, and \d+ of \d+ training"):
        light_parts(config("grpo", task="Poisoned"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", RIVALS)
def test_a_rival_trains_from_the_command_line_at_any_alpha(strategy: str, tmp_path: Path) -> None:
    done = command(
        "powerflow_lit.train",
        [f"strategy={strategy}", "debug=fast", "rollout=hf", "logger=none", "run_dir=run",
         "alpha=0.7", "callbacks.evaluation.max_prompts=16"],
        folder=tmp_path,
        env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first = done.stdout.splitlines()[0]
    supervised = strategy in SUPERVISED
    assert ("(supervised: it learns from the references)" in first) == supervised
    assert "alpha=0.7 (not used)" in first
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["strategy"]) == ("finished", strategy)
    assert (summary["supervised"], summary["uses_alpha"]) == (supervised, False)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    has_reward = strategy not in ("one_shot_em", "format_only")
    assert ("rollout/reward_mean" in rows[0]) == has_reward
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert (sample["reward"] is not None) == has_reward
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert ("with the reference answers as labels" in card) == supervised
