"""Every yaml composes; wrong values are refused by name; defaults are the paper's."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import (
    ConfigError,
    as_dict,
    evaluate_config,
    train_config,
    typed,
)
from powerflow_lit.config.schema import EvaluateConfig, TrainConfig
from powerflow_lit.config.schema_tools import PrepareDataConfig, PretrainConfig, ReportConfig
from powerflow_lit.evaluate import _of_run
from powerflow_lit.run_folder import write_configs

CONF = Path(conf_dir())
NEEDS_A_PLUGIN = ("optuna",)  # composes only where the optional extra is installed


def composed(*overrides: str, config_name: str = "train") -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


def checked(*overrides: str) -> TrainConfig:
    return train_config(composed(*overrides))


LENGTH = ("strategy=powerflow_length", "length_control=target")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(("task", "strategy"), list(product(choices("task"), choices("strategy"))))
def test_every_task_composes_with_every_strategy_and_builds_its_objective(
    task: str, strategy: str
) -> None:
    chosen = ("length_control=target",) if strategy == "powerflow_length" else ()
    config = checked(f"task={task}", f"strategy={strategy}", "alpha=2", *chosen)
    assert config.strategy.name == strategy
    assert callable(instantiate(config.strategy.objective))


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, choice)
        for group in ("log_z", "length_control", "rollout", "alpha_schedule", "trainer",
                      "callbacks", "logger", "optimizer", "finetune", "debug", "guard", "monitor",
                      "experiment", "sweep")
        for choice in choices(group)
        if choice not in NEEDS_A_PLUGIN
    ],
)  # fmt: skip
def test_every_yaml_composes(group: str, choice: str) -> None:
    fitting = ("strategy=tb_traj",) if f"{group}={choice}" == "length_control=target" else ()
    config = checked(f"{group}={choice}", *fitting)
    if group in ("log_z", "alpha_schedule", "length_control"):
        instantiate(getattr(config, group))


@pytest.mark.parametrize(
    "recipe", [p for p in choices("experiment/paper") if not p.startswith("recipe_")]
)
def test_the_papers_recipes_compose_with_the_papers_values(recipe: str) -> None:
    config = checked(f"experiment=paper/{recipe}")
    model, _, task = recipe.rpartition("_")
    assert config.model.name == model
    assert config.model.paper_name is not None
    assert config.task.name == {"reasoning": "reasoning", "creative": "creative_writing"}[task]
    kinds = {"base": 4.0, "instruct": 2.0} if task == "reasoning" else {"instruct": 0.5}
    assert config.alpha == kinds[config.model.kind]
    assert config.strategy.format_penalty == (-0.5 if task == "reasoning" else 0.0)
    if task == "reasoning":  # figure 3 runs to 520 updates
        assert config.refills * config.buffer.updates_per_refill == 520
    # what does not fit one GPU is a word away, and every value can still be overridden
    assert checked(f"experiment=paper/{recipe}", "finetune=lora").finetune.kind == "lora"
    assert checked(f"experiment=paper/{recipe}", "alpha=3", "model=tiny").alpha == 3


@pytest.mark.parametrize(
    ("name", "schema", "overrides"),
    [
        ("evaluate", EvaluateConfig, ()),
        ("pretrain", PretrainConfig, ()),
        ("prepare_data", PrepareDataConfig, ()),
        ("report", ReportConfig, ("runs=[a]",)),
    ],
)
def test_the_other_entry_points_compose(
    name: str, schema: type[Any], overrides: tuple[str, ...]
) -> None:
    typed(composed(*overrides, config_name=name), schema)


def test_alpha_defaults_to_what_the_paper_gives_for_task_and_kind() -> None:
    assert checked().alpha == 4
    assert checked("model=hf", "model.path=x", "model.kind=instruct").alpha == 2
    assert checked("task=creative").alpha == 0.5
    assert checked("task=creative").model.name == "tiny_instruct"
    assert checked("task=creative", "model=hf", "model.path=x").model.name == "hf"
    assert checked("task=creative_writing", "model=hf", "model.path=x").alpha == 0.5
    assert checked("alpha=0.5").alpha == 0.5


def test_a_run_has_no_guard_unless_it_is_asked_for() -> None:
    assert checked("task=creative").guard.min_p == 0
    assert checked("guard=min_p").guard.min_p == 0.05


def test_by_default_a_run_is_warned_of_divergence_and_never_stopped_or_pulled() -> None:
    assert {rule.action for rule in checked().monitor.rules.values()} == {"warn"}
    stop, pull = checked("monitor=stop").monitor.rules, checked("monitor=pull_alpha").monitor.rules
    assert stop.keys() == checked().monitor.rules.keys() < pull.keys()
    assert {rule.action for rule in stop.values()} == {"stop"}
    assert {n for n, r in pull.items() if r.action == "pull"} == {"validity", "format_share", "kl"}
    assert checked("monitor=none").monitor.rules == {}


def test_powerflow_has_the_weight_of_eq_10_and_psi_and_others_only_by_definition() -> None:
    powerflow = checked("epsilon=0.3").strategy
    assert powerflow.format_penalty == -0.5
    assert powerflow.objective["weight"] | {"_target_": ""} == {
        "_target_": "", "kind": "seq_sum", "epsilon_low": 0.3, "epsilon_high": 0.3,
    }  # fmt: skip
    for strategy in set(choices("strategy")) - {"powerflow", "format_only", "powerflow_length"}:
        other = checked(f"strategy={strategy}").strategy
        assert other.format_penalty == 0
        kind = other.objective.get("weight", {}).get("kind", "none")
        assert kind == ("seq_sum" if strategy.startswith("flowrl") else "none")
    ablation = checked("strategy=format_only").strategy
    assert (ablation.format_penalty, ablation.objective["weight"]["kind"]) == (-0.5, "seq_sum")
    chosen = checked(*LENGTH).strategy
    assert (chosen.format_penalty, chosen.objective["weight"]["weight"]["kind"]) == (
        -0.5,
        "seq_sum",
    )
    paper, released = (checked(f"strategy={s}").strategy for s in ("flowrl", "flowrl_unclipped"))
    assert paper.objective["weight"]["epsilon_high"] == 0.2
    assert released.objective["weight"]["epsilon_high"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+alpah=2",), r"unknown key 'alpah': did you mean alpha\?"),
        (("+optimizer.learning_rate=1",), r"unknown key 'optimizer.learning_rate'"),
        (("alpha=0",), "alpha=0"),
        (("epsilon=0",), "epsilon=0"),
        (("refills=0",), "refills=0"),
        (("seed=one",), "seed.*one"),
        (("optimizer.lr=fast",), "optimizer.lr.*fast"),
        (("log_z=group", "rollout.samples_per_prompt=1"), "samples_per_prompt=1.*2 or more"),
        (("strategy.format_penalty=0.5",), "format_penalty=0.5"),
        (("buffer.updates_per_refill=3",), "not divisible"),
        (("strategy=rl_token", "alpha=1"), "alpha > 1"),
        (("strategy=rl_traj", "alpha_schedule=anneal"), "alpha_schedule.start=1.0"),
        (("buffer.max_staleness=-1",), "max_staleness=-1"),
        (("optimizer.betas=[0.9]",), r"betas=\[0.9\]"),
        (("callbacks.selfcheck.prompts=0",), "selfcheck.prompts=0"),
        (("strategy=rl_traj", "rollout.samples_per_prompt=1"), "2 or more"),
        (("guard.min_p=1",), r"guard.min_p=1.0: must lie in \[0, 1\)"),
        (("guard.min_p=-0.1",), "guard.min_p=-0.1"),
        (("+guard.top_p=0.9",), "unknown key 'guard.top_p'"),
        (("+monitor.rules.length.abov=3",), r"did you mean monitor.rules.length.above\?"),
        (("monitor.rules.length.action=halt",), "action=halt: choose one of warn, stop, pull"),
        (("monitor.rules.length.below=null",), "monitor.rules.length: has no bound"),
        (("+monitor.rules.length.above=0.4",), "below=0.5 and above=0.4"),
        (("monitor.rules.length.relative=true",), "relative=True: choose one of factor, diff"),
        (("monitor.rules.length.patience=0",), "patience=0"),
        (("+monitor.rules.x={metric: a, above: 1, patience: 1}",), "monitor.rules.x.action"),
        (("monitor.pull_factor=1",), "monitor.pull_factor=1.0"),
        (("monitor=pull_alpha", "strategy=rl_traj"), "action=pull with strategy=rl_traj"),
        (("monitor=pull_alpha", "strategy=grpo"), "strategy=grpo, which does not use alpha"),
        (("strategy=grpo", "strategy.supervised=false"), "reads the reference answers: such a"),
        (("strategy=empo", "strategy.supervised=true"), "does not hold correct"),
        (("strategy=empo", "strategy.reward.reads=[answers]"), "did you mean answer_class"),
        (("strategy=ttrl", "strategy.reward.trained_share=0.3"), "rollouts are 2.4: must be"),
        (("strategy=ttrl", "rollout.samples_per_prompt=2"), "rollouts are 1: must be a whole"),
        (("strategy=ttrl", "strategy.reward.trained_share=0"), "must lie in .0, 1."),
        (("strategy=grpo", "rollout.samples_per_prompt=1"), "other rollouts: needs 2 or more"),
        (("strategy=intuitor", "guard=min_p"), "over the full vocabulary"),
        (("strategy=one_shot_em", "guard=min_p"), "over the full vocabulary"),
        (("strategy=one_shot_em", "strategy.format_penalty=-1"), "no place for a penalty"),
        (("strategy=intuitor", "rollout.overlap=true"), "its certainty is lost"),
        (("strategy=grpo", "buffer.log_p_old=none"), "surrogate.ratio=token: the importance"),
        (("model.dtype=float64",), "model.dtype=float64"),
        (("buffer.log_p_old=both",), "auto, engine, trainer"),
        (("buffer.min_ess=1",), "buffer.min_ess=1.0: must lie in"),
        (("buffer.min_ess=0.5",), "max_staleness=0: it drops stale trajectories"),
        (
            (
                "buffer.min_ess=0.5",
                "buffer.max_staleness=1",
                "strategy=la_tb",
                "buffer.log_p_old=none",
            ),
            "min_ess=0.5 with buffer.log_p_old=none",
        ),
        (("rollout.base_share=1",), "rollout.base_share=1.0: must lie in"),
        (("rollout.base_share=0.3",), "rollouts are 2.4: must be a whole number"),
        (("rollout.base_share=0.875",), "are 7: must be a whole number that leaves the policy 2"),
        (("rollout.base_share=0.25", "strategy=grpo"), "with strategy=grpo: it learns from"),
        (("rollout.base_share=0.25", "strategy=flowrl"), "with strategy=flowrl: it learns from"),
        (("rollout.base_share=0.25", "strategy=rl_traj"), "with strategy=rl_traj: it learns"),
        (("rollout.base_share=0.25", "strategy=one_shot_em"), "with strategy=one_shot_em: it"),
        (
            ("rollout.base_share=0.25", "strategy.objective.weight.epsilon_low=null"),
            "epsilon_low=null: what the policy has lost would count for nothing",
        ),
        (
            (
                *LENGTH,
                "rollout.base_share=0.25",
                "strategy.objective.weight.weight.epsilon_low=null",
            ),
            "objective.weight.weight.epsilon_low=null: what the policy has lost",
        ),
        (("rollout.base_share=0.25", "rollout.overlap=true"), "0.25 with rollout.overlap=true"),
        (("rollout.base_share=0.25", "guard=min_p"), "0.25 with guard.min_p=0.05"),
        (
            ("rollout.base_share=0.25", "rollout.score_while_generating=true"),
            "0.25 with rollout.score_while_generating=true",
        ),
        (
            ("rollout.base_share=0.25", "rollout.engine.tensor_parallel=2", "trainer.devices=2"),
            "0.25 with rollout.engine.tensor_parallel=2",
        ),
        (("buffer.log_p_old=none",), "log_p_old=none with strategy.objective.weight.kind=seq_sum"),
        (("rollout.overlap=true", "buffer.log_p_old=trainer"), "=trainer with rollout.overlap"),
        (("rollout.overlap=true", "strategy=la_tb", "buffer.log_p_old=none"), "=none with rollout"),
        (("rollout.overlap=true", "rollout.engine.sleep=true"), "rollout.engine.sleep=true with"),
        (("rollout.overlap=true", "guard=min_p"), "min_p=0.05 with rollout.overlap=true"),
        (("rollout.overlap=true", "rollout.score_while_generating=true"), "generating=true with"),
        (("guard=min_p", "rollout.score_while_generating=true"), "min_p=0.05 with rollout.score"),
        (("trainer=fsdp", "rollout.score_while_generating=true"), "with trainer=fsdp: ranks make"),
        (("trainer=fsdp", "rollout=vllm_server"), "rollout=vllm_server with trainer=fsdp"),
        (("model=hf",), "model.path"),
        (("model.prompt_route=poem",), "prompt_route=poem: choose one of auto, plain, chat"),
        (("model.base_dtype=int8",), "model.base_dtype=int8"),
        (("finetune.rank=4",), "finetune.rank=4 needs finetune=lora"),
        (("finetune=lora", "finetune.dropout=0.1"), "finetune.dropout=0.1: must be 0"),
        (("finetune=lora", "finetune.rank=0"), "finetune.rank=0"),
        (("finetune=lora", "finetune.lora_alpha=null"), "finetune.lora_alpha=null"),
        (("finetune.lr_factor=0",), "finetune.lr_factor=0.0: must be positive"),
        (("model.lr=fast",), "model.lr.*fast"),
        (("callbacks.export_dtype=int4",), "callbacks.export_dtype=int4"),
        (("alpha=inf",), "alpha=inf: must be a finite number"),
        (("alpha=",), "alpha='': must be a number"),
        (("model.name=null",), "model.name=null: must be text"),
        (("logger.tags=a",), r"logger.tags=a: must be a list, as in logger.tags=\[a\]"),
        (("seed=4294967296",), r"seed=4294967296: must lie in \[0, 4294967295\]"),
        (("callbacks.evaluation.seed=-1",), "callbacks.evaluation.seed=-1"),
        (("optimizer.lr=0",), "optimizer.lr=0.0: must be positive"),
        (("optimizer.weight_decay=-0.1",), "optimizer.weight_decay=-0.1: must be 0 or more"),
        (("optimizer.grad_clip=0",), "optimizer.grad_clip=0.0: must be positive"),
        (("optimizer.warmup_steps=-1",), "optimizer.warmup_steps=-1: must be 0 or more"),
        (("optimizer.betas=[0.9, 1.0]",), r"betas=\[0.9, 1.0\]: AdamW takes two in \[0, 1\)"),
        (("strategy.loss_scale=0",), "strategy.loss_scale=0.0: must be positive"),
        (("strategy=tb_token", "strategy.calibrate.scale=mean"), "choose one of length_mean"),
        (("log_z=ema", "log_z.rate=0"), r"log_z.rate=0: must lie in \(0, 1\]"),
        (("log_z=ema", "log_z.scope=prompts"), "log_z.scope=prompts: did you mean prompt"),
        (("log_z.width=6.5",), "log_z.width=6.5: must be a whole number"),
        (("log_z=fixed", "log_z.value=one"), "log_z.value=one: must be a number"),
        (("+log_z.rate=0.1",), "unknown key 'log_z.rate': powerflow_lit.log_z.HeadLogZ takes"),
        (("log_z=group", "+log_z.width=3"), "GroupLogZ takes no key at all"),
        (("alpha_schedule=anneal", "alpha_schedule.share=0"), r"share=0: must lie in \(0, 1\]"),
        (("alpha_schedule=anneal", "alpha_schedule.start=-1"), "start=-1: must be positive"),
        (("length_control=target",), "strategy=powerflow: its objective fixes the length"),
        (("length_control=target", "strategy=grpo"), "take strategy=powerflow_length or tb_traj"),
        (("strategy=powerflow_length",), "without a chosen length.*add length_control=target"),
        ((*LENGTH, "length_control.tokens=96"), "tokens=96: must lie between 1 and .*tokens=96"),
        ((*LENGTH, "length_control.tokens=1"), "tokens=1: must lie between 1 and"),
        ((*LENGTH, "length_control.factor=0"), "length_control.factor=0: must be positive"),
        ((*LENGTH, "length_control.factor=0.4"), "factor=0.4 breaks the monitor's rule length "),
        ((*LENGTH, "length_control.tokens=1.5"), "tokens=1.5 breaks the monitor's rule length_f"),
        ((*LENGTH, "length_control.scope=prompts"), "did you mean prompt"),
        ((*LENGTH, "length_control.follow=2"), r"follow=2: must lie in \[0, 1\]"),
        ((*LENGTH, "length_control.rate=fast"), "length_control.rate=fast: must be a number"),
        ((*LENGTH, "length_control.bounds=[1]"), r"bounds=\[1\]: must be two numbers"),
        ((*LENGTH, "length_control.bounds=[1, -1]"), "the first must be the lesser"),
        ((*LENGTH, "log_z=fixed"), "log_z=fixed: log Z follows from the price"),
        ((*LENGTH, "buffer.log_p_old=none"), "length_control=target with buffer.log_p_old=none"),
        ((*LENGTH, "rollout.samples_per_prompt=1"), "within the rollouts of a prompt"),
        (("buffer.prompts_per_update=17",), "the buffer holds 16 prompt groups at most"),
        (("buffer.prompts_per_update=0",), "buffer.prompts_per_update=0: must be 1 or more"),
        (("tokens_per_microbatch=0",), "tokens_per_microbatch=0"),
        (("rollout.max_prompt_tokens=0",), "rollout.max_prompt_tokens=0"),
        (("model.threads=0",), "model.threads=0"),
        (("trainer.accelerator=gpus",), "trainer.accelerator=gpus: did you mean gpu"),
        (("trainer.devices=0",), "trainer.devices=0: must be 1 or more"),
        (("+trainer.gradient_clip_val=1",), "the run sets it itself; set optimizer.grad_clip="),
        (("logger.project=me/mine",), "without /; the user or team is logger.entity="),
        (("callbacks.push_to_hub=mine",), "push_to_hub=mine: must be <user>/<name>"),
        (("callbacks.push_to_hub=a/b", "callbacks.export=false"), "needs callbacks.export=true"),
        (("run_dir=${nothing}",), "run_dir: interpolation key 'nothing' not found"),
    ],
)
def test_bad_values_are_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(*overrides)


def test_every_value_in_conf_is_explained() -> None:
    """A field carries a comment in one of its group's files, unless its name says all."""
    groups = {"strategy", "optimizer", "rollout", "log_z", "guard", "monitor", "finetune"}
    plain = {"name", "kind", "_target_", "_partial_", "betas", "dtype"}
    for path in CONF.glob("**/*.yaml"):
        text = path.read_text()
        assert text.startswith("#"), f"{path.name} does not say what it is"
        if path.parent.name not in groups:
            continue
        known = "\n".join(p.read_text() for p in path.parent.glob("*.yaml"))
        for key in re.findall(r"^ *(\w+): *[^\s#]", text, flags=re.M):
            explained = re.search(rf"^ *{key}:[^\n]*#", known, flags=re.M)
            assert key in plain or explained, f"{path.name}: {key} is not explained"


def test_configuration_loads_without_torch_or_vllm() -> None:
    code = (
        "import sys, powerflow_lit.config.launching, powerflow_lit.config.engines; "
        "assert not {'torch', 'vllm', 'lightning', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("task", ["reasoning", "creative_writing", "creative"])
def test_an_evaluation_takes_a_runs_model_task_and_alpha_and_what_was_typed(
    task: str, tmp_path: Path
) -> None:
    trained = checked(f"task={task}", "model=hf", "model.path=m", "model.revision=abc", "alpha=3")
    write_configs(tmp_path, as_dict(trained), [])
    (tmp_path / "export").mkdir()
    typed_by_user = [f"run={tmp_path}", "model.engine_dtype=float32"]
    cfg = composed(*typed_by_user, config_name="evaluate")
    found = evaluate_config(_of_run(cfg, typed_by_user))
    assert (found.task.name, found.alpha) == (task, 3.0)
    assert found.task.build == trained.task.build
    assert found.rollout.max_new_tokens == trained.rollout.max_new_tokens
    assert found.model.path == str(tmp_path / "export")
    assert found.model.revision is None  # a folder has none
    assert found.model.engine_dtype == "float32"
