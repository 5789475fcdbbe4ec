"""One training run in its folder: builds everything, fits, exports, and says how it ended."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate

from powerflow_lit import run_folder
from powerflow_lit.assembly import (
    build_callbacks,
    build_datamodule,
    build_module,
    build_policy,
    build_wandb,
)
from powerflow_lit.callbacks import Evaluation
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.continuing import refuse_another_run
from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.export import data_notes, export, model_card, push
from powerflow_lit.metrics_csv import MetricsCsv
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.monitor import Monitor
from powerflow_lit.precision import with_half_precision
from powerflow_lit.preflight import Parts, light_parts
from powerflow_lit.resume import checkpoint_of


def run(
    config: TrainConfig, run_dir: Path, overrides: Sequence[str], parts: Parts | None = None
) -> dict[str, Any]:
    """One training run in its folder; returns what summary.json says.

    Args:
        parts: the strategy's objective and the task, where they are built already.

    Raises:
        ConfigError: the folder already holds a run and `resume` does not name it.
    """
    clock = PhaseClock()
    refuse_another_run(run_dir, config.resume)
    checkpoint = checkpoint_of(run_dir) if config.resume else None
    # what can be wrong with strategy and task shows before a model loads
    parts = parts or light_parts(config)
    run_folder.write_configs(run_dir, as_dict(config), overrides)
    L.seed_everything(config.seed, verbose=False)
    objective, task = parts.objective, parts.task
    print(*task.notes, sep="\n", end="\n" if task.notes else "")
    policy, tokenizer = build_policy(config)
    module = build_module(config, policy, objective)
    data = build_datamodule(config, task, tokenizer, clock)
    evaluation, callbacks = build_callbacks(config, run_dir, task, clock)
    step, refills = checkpoint.progress if checkpoint else (None, 0)
    run_folder.cut_samples(run_dir, refills)
    run_folder.cut_problems(run_dir, refills)
    loggers: list[Any] = [MetricsCsv(run_dir, keep_until=step)]
    if config.logger.name == "wandb":
        loggers.append(build_wandb(config, run_dir))
    trainer: L.Trainer = instantiate(
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
    status, stopped_by, pushed = "failed", None, None
    try:
        path = str(checkpoint.path) if checkpoint else None
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        stopped_by = next((c.stopped_by for c in callbacks if isinstance(c, Monitor)), None)
        status = "finished" if stopped_by is None else "diverged"
        if config.callbacks.export and stopped_by is None:
            summary = _summary(config, status, module, data, evaluation, clock)
            card = model_card(as_dict(config), summary, data_notes(data))
            dtype = config.callbacks.export_dtype
            export(policy, tokenizer, run_dir, dtype=dtype, card=card)
            pushed = _push(config, run_dir)
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        print(f"interrupted; continue with: python -m powerflow_lit.train resume={run_dir}")
        raise
    finally:
        data.close()
        for callback in callbacks:
            getattr(callback, "stop", lambda: None)()
        summary = _summary(config, status, module, data, evaluation, clock)
        if stopped_by is not None:
            summary["stopped_by"] = stopped_by
        if pushed is not None:
            summary["push_to_hub"] = pushed
        run_folder.write_summary(run_dir, summary)
        if config.logger.name == "wandb":
            _finish_wandb(loggers[-1], summary)
    return summary


def _push(config: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """Upload the export where that is asked for; what summary.json says of it."""
    repo = config.callbacks.push_to_hub
    if repo is None:
        return None
    print(f"pushing {run_dir / 'export'} to {repo}")
    failure = push(run_dir / "export", repo, private=config.callbacks.push_private)
    if failure is not None:
        print(
            f"warning: not pushed to {repo}: {failure} "
            f"(later: hf upload {repo} {run_dir / 'export'})",
            file=sys.stderr,
        )
    return {"repo": repo, "error": failure}


def _summary(
    config: TrainConfig,
    status: str,
    module: PowerFlowModule,
    data: RolloutDataModule,
    evaluation: Evaluation,
    clock: PhaseClock,
) -> dict[str, Any]:
    return {
        "status": status,
        "task": config.task.name,
        "model": config.model.name,
        "finetune": config.finetune.kind,
        "strategy": config.strategy.name,
        "alpha": config.alpha,
        "epsilon": config.epsilon,
        "seed": config.seed,
        "refills": data.buffer.refill + 1,
        "steps": module.global_step if module._trainer is not None else 0,
        "skipped_steps": module.skipped_steps,
        "base": evaluation.base,
        "base_decodings": evaluation.base_decodings,
        "final": evaluation.final,
        "wall_s": round(clock.wall, 2),
        "phases": {name: round(seconds, 2) for name, seconds in clock.total.items()},
        "tokens": data.tokens_generated,
        "versions": run_folder.versions(),
        "git_commit": run_folder.git_commit(),
    }


def _finish_wandb(logger: Any, summary: dict[str, Any]) -> None:
    """Close the W&B run, so that the next job of a multirun gets its own."""
    experiment = logger.experiment
    experiment.summary.update({k: summary[k] for k in ("status", "wall_s", "tokens")})
    experiment.finish(exit_code=0 if summary["status"] == "finished" else 1)
