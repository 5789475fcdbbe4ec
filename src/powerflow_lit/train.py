"""Train a policy towards the alpha-power of its base.

python -m powerflow_lit.train                                  # the embedded model, in minutes
python -m powerflow_lit.train task=creative alpha=0.5
python -m powerflow_lit.train -m strategy=tb_traj,tb_token,powerflow alpha=2,4
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from powerflow_lit import run_folder
from powerflow_lit.assembly import (
    build_callbacks,
    build_datamodule,
    build_module,
    build_policy,
    build_wandb,
    wandb_mode,
)
from powerflow_lit.callbacks import Evaluation
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, as_dict, train_config
from powerflow_lit.config.fallback import with_available_engine
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.console import final_table, phase_line, quiet, wide_console
from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.errors import USER_ERRORS, root_cause
from powerflow_lit.export import data_notes, export, model_card, push
from powerflow_lit.memory_check import check_memory
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.monitor import Monitor
from powerflow_lit.precision import with_half_precision
from powerflow_lit.resume import checkpoint_of, expand_resume, find_unfinished
from powerflow_lit.sweep import ENDED, all_jobs_known, job_state


def run(config: TrainConfig, run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One training run in its folder; returns what summary.json says.

    Raises:
        ConfigError: the folder already holds a run and `resume` does not name it.
    """
    clock = PhaseClock()
    checkpoint = checkpoint_of(run_dir) if config.resume else None
    if checkpoint is None and (run_dir / "metrics.csv").exists() and not config.resume:
        raise ConfigError(
            f"run_dir={run_dir} already holds a run: continue it with resume={run_dir}, "
            "or choose another run_dir"
        )
    run_folder.write_configs(run_dir, as_dict(config), overrides)
    L.seed_everything(config.seed, verbose=False)
    # what can be wrong with strategy and task shows before a model loads
    objective, task = instantiate(config.strategy.objective), instantiate(config.task.build)
    task.train_prompts(), task.eval_prompts()
    print(*task.notes, sep="\n", end="\n" if task.notes else "")
    policy, tokenizer = build_policy(config)
    module = build_module(config, policy, objective)
    data = build_datamodule(config, task, tokenizer, clock)
    evaluation, callbacks = build_callbacks(config, run_dir, task, clock)
    step, refills = checkpoint.progress if checkpoint else (None, 0)
    run_folder.cut_samples(run_dir, refills)
    run_folder.cut_problems(run_dir, refills)
    loggers: list[Any] = [run_folder.MetricsCsv(run_dir, keep_until=step)]
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


def announce(config: TrainConfig, run_dir: Path) -> None:
    """What is about to run, in three lines."""
    rollout = config.rollout
    print(
        f"{config.task.name} on {config.model.name}: strategy={config.strategy.name} "
        f"alpha={config.alpha:g} epsilon={config.epsilon:g} seed={config.seed}\n"
        f"{config.refills} refills of {rollout.prompts_per_refill} prompts x "
        f"{rollout.samples_per_prompt} rollouts, {config.buffer.updates_per_refill} updates each, "
        f"into {run_dir}"
    )
    if config.logger.name == "wandb":
        mode = wandb_mode(config.logger.mode)
        why = "no key or login: " if config.logger.mode == "auto" else ""
        hint = f" ({why}upload later with `wandb sync {run_dir}/wandb/offline-run-*`)"
        print(f"W&B {mode}{hint if mode == 'offline' else ''}")


def _job_folder(run_dir: str, output_dir: str, overrides: Sequence[str]) -> str:
    """The folder of a multirun's job: Hydra's, or one below the run_dir that was typed."""
    typed = any(override.startswith("run_dir=") for override in overrides)
    return str(Path(run_dir) / Path(output_dir).name) if typed else output_dir


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="train")
def _main(cfg: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        folder = Path(_job_folder(cfg.run_dir, hydra_config.runtime.output_dir, overrides))
        try:
            return _job(cfg, folder, overrides)
        except Exception:
            # the other jobs go on, and SweepCallback lists this one at the end; a sweeper that
            # optimises must see the error itself
            if not all_jobs_known(hydra_config):
                raise
            return None
    try:
        config = train_config(with_available_engine(cfg))
        if config.resume == "auto":
            config.run_dir = str(find_unfinished(config) or config.run_dir)
        return _headline(_announced_run(config, overrides))
    except USER_ERRORS as error:
        print(f"error: {root_cause(error)}", file=sys.stderr)
        sys.exit(2)


def _job(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> float | None:
    """One job of a sweep: skipped if it has ended before, resumed if it had begun.

    An error is printed and kept in summary.json before it is raised.
    """
    state = job_state(folder)
    if state in ENDED:
        summary = run_folder.read_summary(folder) or {}
        commit = str(summary.get("git_commit"))[:7]
        print(f"skipped: {folder} {state} before (commit {commit}); delete it to run it again")
        return _headline(summary)
    try:
        config = train_config(with_available_engine(cfg))
        config.run_dir = str(folder)
        config.resume = str(folder) if state in ("unfinished", "failed") else None
        return _headline(_announced_run(config, overrides))
    except Exception as error:
        if not isinstance(error, USER_ERRORS):
            traceback.print_exc()
        print(f"error: {root_cause(error)}", file=sys.stderr)
        if job_state(folder) in ENDED:  # it went wrong after the run itself
            raise
        folder.mkdir(parents=True, exist_ok=True)
        summary = run_folder.read_summary(folder) or {}
        failure = {**summary, "status": "failed", "error": str(root_cause(error))}
        run_folder.write_summary(folder, failure)
        raise


def _announced_run(config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The run, with what a person wants to know before and after it."""
    run_dir = Path(config.run_dir)
    quiet()
    if config.model.estimate_only:
        check_memory(config)
        return {}
    announce(config, run_dir)
    check_memory(config)
    summary = run(config, run_dir, overrides)
    wide_console().print(
        final_table(summary), phase_line(summary), f"run folder: {run_dir}", sep="\n"
    )
    return summary


def _headline(summary: Mapping[str, Any]) -> float | None:
    """The task's first `val/` metric, for sweepers that optimise."""
    return next((float(value) for value in summary.get("final", {}).values()), None)


def main() -> None:
    """Console script `powerflow-train`."""
    sys.argv[1:] = expand_resume(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
