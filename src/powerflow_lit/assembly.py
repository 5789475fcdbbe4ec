"""From a checked configuration to live objects; shared by the entry points."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.callbacks import Evaluation, Samples, SelfCheck, StepMetrics
from powerflow_lit.checkpoints import Checkpoint
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.schema import (
    FinetuneConfig,
    ModelConfig,
    StrategyConfig,
    TrainConfig,
)
from powerflow_lit.config.secrets import hidden
from powerflow_lit.console import RefillProgress
from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.garbage import not_searched
from powerflow_lit.health import Health
from powerflow_lit.interrupt import StopSignals, StopWhereSafe
from powerflow_lit.models.base import frozen_base
from powerflow_lit.models.checkpointing import checkpoint_layers
from powerflow_lit.models.fingerprint import vocabulary_fingerprint, weights_fingerprint
from powerflow_lit.models.loading import end_ids, load_model, load_tokenizer, local_folder
from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.packed_attention import PackingError
from powerflow_lit.models.probes import allow_packing, check_output_layer
from powerflow_lit.models.prompting import route_line
from powerflow_lit.module import Objective, PowerFlowModule
from powerflow_lit.monitor import Monitor, Rule
from powerflow_lit.precision import with_half_precision
from powerflow_lit.preflight import ranks_of
from powerflow_lit.rewarding import RewardSettings
from powerflow_lit.rollout import ReplayBuffer, RolloutEngine
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.shared_engine import SharedEngine, engine_group
from powerflow_lit.samplers import Decoding, EvaluationSettings
from powerflow_lit.scoring import RolloutSettings
from powerflow_lit.steering import Steering
from powerflow_lit.tasks.base import Task
from powerflow_lit.wandb_login import wandb_mode

BY_PROGRESS = "by progress"  # of an alpha_schedule without a state


def build_model(config: ModelConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """Policy and tokenizer; also sets the number of CPU threads that suits the model."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source: Any = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    tokenizer = load_tokenizer(config.path, **source)
    model = load_model(
        config.path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        **source,
    )
    check_output_layer(model)
    if config.packing:
        try:
            allow_packing(model)
        except PackingError as error:
            print(f"rows are padded, not packed (model.packing): {error}")
    return model, tokenizer


def build_policy(config: TrainConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """What will be trained: the model, with an adapter and checkpointed layers if asked for."""
    policy, tokenizer = build_model(config.model)
    if config.finetune.kind == "lora":
        add_lora(policy, lora_settings(config.finetune))
    if config.model.gradient_checkpointing:
        checkpoint_layers(policy)
    print(route_line(tokenizer, config.model.prompt_route))  # type: ignore[arg-type]
    return policy, tokenizer


def lora_settings(tuned: FinetuneConfig) -> LoraSettings:
    """The adapter of `finetune=lora`, from values that the checks have passed."""
    targets = tuned.target_modules
    assert tuned.rank is not None
    assert tuned.lora_alpha is not None
    return LoraSettings(
        rank=tuned.rank,
        lora_alpha=tuned.lora_alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
    )


def build_engine(
    engine: dict[str, Any],
    model: ModelConfig,
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    max_model_len: int,
    seed: int,
) -> RolloutEngine:
    """The engine of a `rollout=` choice, still without weights."""
    spec = EngineSpec(
        policy=policy,
        model_path=local_folder(model.path, revision=model.revision),
        pad_id=int(tokenizer.pad_token_id),
        eos_ids=end_ids(policy, tokenizer, model.stop_tokens),
        max_model_len=max_model_len,
        seed=seed,
        trust_remote_code=model.trust_remote_code,
    )
    sharing = int(engine.get("tensor_parallel", 1))
    with not_searched():  # vLLM imports as much again
        built: RolloutEngine = instantiate(engine)(spec)
        return built if sharing == 1 else SharedEngine(built, engine_group(sharing))


def build_module(
    config: TrainConfig, policy: PreTrainedModel, objective: Objective
) -> PowerFlowModule:
    """The LightningModule of a training run."""
    optimizer = config.optimizer
    return PowerFlowModule(
        policy=policy,
        objective=objective,
        log_z=instantiate(config.log_z),
        alpha=config.alpha,
        alpha_schedule=instantiate(config.alpha_schedule),
        length_control=instantiate(config.length_control),
        format_penalty=config.strategy.format_penalty,
        calibrate=config.strategy.calibrate,
        loss_scale=config.strategy.loss_scale,
        lr=optimizer.lr,
        log_z_lr=optimizer.log_z_lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        weight_decay=optimizer.weight_decay,
        warmup_steps=optimizer.warmup_steps,
        fused_optimizer=optimizer.fused,
        grad_clip=optimizer.grad_clip,
        log_z_grad_clip=optimizer.log_z_grad_clip,
        max_skipped_in_a_row=optimizer.max_skipped_in_a_row,
        tokens_per_microbatch=config.tokens_per_microbatch,
        logit_chunk_mb=config.logit_chunk_mb,
        base=frozen_base(policy, getattr(torch, config.model.base_dtype)),
        flow=None if config.strategy.flow is None else instantiate(config.strategy.flow),
    )


def build_datamodule(
    config: TrainConfig, task: Task, tokenizer: Tokenizer, clock: PhaseClock
) -> RolloutDataModule:
    """The data module; it builds the engine when first asked for rollouts."""
    rollout, buffer = config.rollout, config.buffer
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens

    def engine(module: PowerFlowModule) -> RolloutEngine:
        return build_engine(
            rollout.engine,
            config.model,
            module.policy,
            tokenizer,
            max_model_len=longest,
            seed=config.seed,
        )

    return RolloutDataModule(
        task=task,
        tokenizer=tokenizer,
        engine_factory=engine,
        buffer=ReplayBuffer(
            max_staleness=buffer.max_staleness,
            updates_per_refill=buffer.updates_per_refill,
            prompts_per_update=buffer.prompts_per_update,
            seed=config.seed,
        ),
        settings=RolloutSettings(
            prompts_per_refill=rollout.prompts_per_refill,
            samples_per_prompt=rollout.samples_per_prompt,
            base_share=rollout.base_share,
            max_new_tokens=rollout.max_new_tokens,
            max_prompt_tokens=rollout.max_prompt_tokens,
            log_p_old=buffer.log_p_old,  # type: ignore[arg-type]
            logp_gap_trajectories=rollout.logp_gap_trajectories,
            logp_gap_limit=rollout.logp_gap_limit,
            tokens_per_microbatch=config.tokens_per_microbatch,
            logit_chunk_mb=config.logit_chunk_mb,
            guard_min_p=config.guard.min_p,
            overlap=rollout.overlap,
            score_while_generating=rollout.score_while_generating,
            shares_engine=int(rollout.engine.get("tensor_parallel", 1)) > 1,
            min_ess=buffer.min_ess,
        ),
        prompt_route=config.model.prompt_route,  # type: ignore[arg-type]
        seed=config.seed,
        clock=clock,
        reward=reward_settings(config.strategy),
    )


def reward_settings(strategy: StrategyConfig) -> RewardSettings | None:
    """The strategy's reward; None where it takes none."""
    chosen = strategy.reward
    if chosen is None:
        return None
    return RewardSettings(instantiate(chosen.function), tuple(chosen.reads), chosen.trained_share)


def build_trainer(
    config: TrainConfig, run_dir: Path, callbacks: list[L.Callback], loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer: an epoch is a refill, and what it could write beside us is off."""
    return instantiate(
        with_half_precision(config.trainer),
        max_epochs=config.refills,
        callbacks=callbacks,
        logger=loggers,
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=str(run_dir),
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )


def identity_of(
    config: TrainConfig, policy: PreTrainedModel, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What must be the same when the run is resumed; the policy is not trained yet."""
    return {
        **chosen_identity(config),
        "vocabulary": vocabulary_fingerprint(tokenizer),
        "weights": weights_fingerprint(policy),
    }


def chosen_identity(config: TrainConfig) -> dict[str, Any]:
    """The part of it that is known before a model loads."""
    return {
        "alpha": config.alpha,
        "alpha_schedule": target_of(config) or BY_PROGRESS,
        "strategy": config.strategy.name,
        "finetune": _finetune_of(config.finetune),
        "log_z": str(config.log_z.get("_target_")).rpartition(".")[2],
        "length_control": _length_control_of(config.length_control),
        "ranks": ranks_of(config),
    }


def target_of(config: TrainConfig) -> str | None:
    """What a schedule aims at; None where alpha goes by the progress of the run."""
    target = config.alpha_schedule.get("target")
    return None if target is None else str(target.get("_target_")).rpartition(".")[2]


def _length_control_of(node: Mapping[str, Any]) -> str:
    """The length that was chosen, in words."""
    name = str(node.get("_target_")).rpartition(".")[2]
    if name != "ChosenLength":
        return "none" if name == "LengthControl" else name
    tokens = node["tokens"]
    chosen = f"{node['factor']:g} x the base's" if tokens is None else f"{tokens:g} tokens"
    return f"{chosen} ({node['scope']})"


def _finetune_of(tuned: FinetuneConfig) -> str:
    """What decides the shapes of what is trained."""
    if tuned.kind == "full":
        return tuned.kind
    return f"{tuned.kind} of rank {tuned.rank} on {tuned.target_modules}"


def build_callbacks(
    config: TrainConfig,
    run_dir: Path,
    task: Task,
    clock: PhaseClock,
    signals: StopSignals,
    identity: Mapping[str, Any],
) -> tuple[Evaluation, list[L.Callback]]:
    """The evaluation callback, and all callbacks in the order in which they must run."""
    chosen = config.callbacks
    evaluation = Evaluation(
        run_dir,
        every_n_refills=chosen.evaluation.every_n_refills,
        max_prompts=chosen.evaluation.max_prompts,
        settings=EvaluationSettings(
            samples_per_prompt=chosen.evaluation.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=chosen.evaluation.seed,
        ),
        base_decodings=[
            Decoding(d.temperature, min_p=d.min_p, top_p=d.top_p)
            for d in chosen.evaluation.base_decodings
        ],
        clock=clock,
    )
    steps = StepMetrics(clock)
    checkpoint = Checkpoint(run_dir, **vars(chosen.checkpoint), identity=identity)
    return evaluation, [
        steps,
        evaluation,
        SelfCheck(
            every_n_refills=chosen.selfcheck.every_n_refills, prompts=chosen.selfcheck.prompts
        ),
        Samples(run_dir, per_refill=chosen.samples.per_refill),
        RefillProgress(
            steps,
            evaluation,
            every_n_refills=chosen.console.every_n_refills,
            headline=task.headline,
        ),
        StopWhereSafe(signals),
        Health(),
        Steering(),
        *build_monitor(config, checkpoint.path),
        # last, so that a checkpoint holds what the others logged
        checkpoint,
    ]


def build_monitor(config: TrainConfig, checkpoint: Path) -> list[L.Callback]:
    """The monitor of a `monitor=` choice; nothing where no rule is set."""
    monitor = config.monitor
    rules = [Rule(name=name, **vars(rule)) for name, rule in monitor.rules.items()]
    if not rules:
        return []
    return [
        Monitor(
            rules,
            pull_factor=monitor.pull_factor,
            pull_recovery=monitor.pull_recovery,
            checkpoint=checkpoint,
        )
    ]


def build_wandb(config: TrainConfig, run_dir: Path) -> Logger:
    """The W&B logger; the run's id is kept in the run folder, so that a resumed run goes on."""
    import wandb

    if wandb.run is not None:  # of a job that broke off; Lightning would go on writing into it
        wandb.run.finish(exit_code=1)
    id_file = run_dir / "wandb" / "run_id"
    if not id_file.exists():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(uuid.uuid4().hex[:8])
    offline = wandb_mode(config.logger.mode) == "offline"
    sys.argv[1:] = hidden(sys.argv[1:])  # W&B keeps what was typed; Hydra has read it
    return WandbLogger(
        name=f"{config.strategy.name}_alpha{config.alpha:g}_seed{config.seed}",
        id=id_file.read_text(),
        save_dir=str(run_dir),
        project=hidden(config.logger.project),
        entity=config.logger.entity,
        offline=offline,
        group=hidden(config.logger.group),
        job_type=config.strategy.name,
        tags=wandb_tags(config),
        config=hidden(as_dict(config)),
        resume="allow",
        settings=wandb.Settings(silent=True),
    )


def wandb_tags(config: TrainConfig) -> list[str]:
    """What a panel or a table is filtered by, then the user's own; W&B takes 64 characters each."""
    strategy = config.strategy
    automatic = [strategy.name, config.task.name, config.model.name]
    automatic += [f"alpha={config.alpha:g}"] if strategy.uses_alpha else []
    automatic += ["supervised"] if strategy.supervised else []
    tags = [*automatic, *config.logger.tags]
    return list(dict.fromkeys(hidden(tag)[:64] for tag in tags))
