"""One training run in its folder: builds everything, fits, exports, and says how it ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from powerflow_lit import meeting, run_folder
from powerflow_lit.assembly import (
    build_callbacks,
    build_datamodule,
    build_module,
    build_policy,
    build_trainer,
    build_wandb,
    chosen_identity,
    identity_of,
)
from powerflow_lit.callbacks import Evaluation
from powerflow_lit.checkpoint_io import StraightCheckpointIO
from powerflow_lit.checkpoints import LAST
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.processes import rank_here
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.config.secrets import hidden
from powerflow_lit.continuing import refuse_another_run
from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.disk import DiskError, explained
from powerflow_lit.diverged import DivergedError
from powerflow_lit.errors import root_cause
from powerflow_lit.export import data_notes, export, model_card, push
from powerflow_lit.health import warnings_of
from powerflow_lit.interrupt import Stopped, StopSignals, StopWhereSafe
from powerflow_lit.metrics_csv import MetricsCsv
from powerflow_lit.models.sharding import agreed, is_sharded
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.monitor import Monitor
from powerflow_lit.preflight import Parts, light_parts, ranks_of
from powerflow_lit.resume import (
    ResumePoint,
    changed_settings,
    checkpoint_of,
    point_at,
    refuse_another,
    set_damaged_aside,
)
from powerflow_lit.watch import Watch


def run(
    config: TrainConfig, run_dir: Path, overrides: Sequence[str], parts: Parts | None = None
) -> dict[str, Any]:
    """One training run in its folder; returns what summary.json says.

    Args:
        parts: the strategy's objective and the task, where they are built already.

    Raises:
        ConfigError: the folder already holds a run and `resume` does not name it, or another
            process is running in it.
        CheckpointError: the run cannot be continued.
        Stopped: a signal asked it to stop; it is saved.
    """
    # what can be wrong with strategy and task shows before a model loads
    parts = parts or light_parts(config)
    with StopSignals(config.callbacks.stop_signals) as signals:
        try:
            if rank_here() > 0:  # its folder is the first rank's
                told = meeting.hear()
                point = point_at(Path(told.checkpoint)) if told.checkpoint else None
                return _run(config, told.folder, overrides, parts, signals, point)
            with run_folder.held(run_dir):
                point = _decided_point(config, run_dir)
                return _run(config, run_dir, overrides, parts, signals, point)
        finally:
            meeting.over()


def _decided_point(config: TrainConfig, run_dir: Path) -> ResumePoint | None:
    """What the run goes on from, as all its ranks are told."""
    decision = None
    try:
        point = _resume_point(config, run_dir)
        path = str(point.path) if point else None
        decision = meeting.Decision(str(run_dir), path, ranks_of(config))
    finally:
        if decision is None or decision.ranks > 1:
            meeting.decide(decision)
    return point


def _run(
    config: TrainConfig,
    run_dir: Path,
    overrides: Sequence[str],
    parts: Parts,
    signals: StopSignals,
    point: ResumePoint | None,
) -> dict[str, Any]:
    clock = PhaseClock()
    first = rank_here() == 0  # it alone writes files
    objective, task = parts.objective, parts.task
    if point is None and first:
        run_folder.write_configs(run_dir, as_dict(config), overrides)
    L.seed_everything(config.seed, verbose=False)
    print(*task.notes, sep="\n", end="\n" if task.notes else "")
    policy, tokenizer = build_policy(config)
    identity = identity_of(config, policy, tokenizer)
    if point is not None and first:
        refuse_another(point, identity, force=config.resume_force)
    module = build_module(config, policy, objective)
    data = build_datamodule(config, task, tokenizer, clock)
    evaluation, callbacks = build_callbacks(config, run_dir, task, clock, signals, identity)
    loggers: list[Any] = []
    if first:
        # only once the checkpoint is loaded: what is refused till then leaves the folder as it was
        callbacks.append(LambdaCallback(on_fit_start=lambda *_: begin(run_dir, config, overrides)))
        loggers = _loggers(config, run_dir, point)
    trainer = build_trainer(config, run_dir, callbacks, loggers)
    trainer.strategy.checkpoint_io = StraightCheckpointIO()
    watch = _watch(trainer, callbacks, signals, run_dir)
    ending: dict[str, Any] = {"status": "failed"}
    try:
        path = str(point.path) if point else None
        with signals.deferred(), explained(lambda: how_to_go_on(run_dir)), watch:
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        # one that came after the last update; ranks that share a model export it together
        agreed(is_sharded(policy), signals.check)
        stopped_by = next((c.stopped_by for c in callbacks if isinstance(c, Monitor)), None)
        ending["status"] = "finished" if stopped_by is None else "diverged"
        if stopped_by is not None:
            ending["stopped_by"] = stopped_by
        elif config.callbacks.export and (first or is_sharded(policy)):
            summary = _summary(config, module, data, evaluation, clock, ending)
            notes = data_notes(data, supervised=config.strategy.supervised)
            card = hidden(model_card(as_dict(config), summary, notes))
            dtype = config.callbacks.export_dtype
            with explained(lambda: how_to_go_on(run_dir)):
                export(policy, tokenizer, run_dir, dtype=dtype, card=card)
            ending |= _push(config, run_dir) if first else {}
    except DivergedError as error:
        ending |= {"status": "diverged", "stopped_by": str(error)}
        print(f"stopped: {error}")
    except (Stopped, SIGTERMException) as error:
        number = error.signal if isinstance(error, Stopped) else signal.SIGTERM
        ending |= {"status": "interrupted", "stopped_by": signal.Signals(number).name}
        saved = not (isinstance(error, Stopped) and error.at_once) and module.is_healthy
        print(
            f"interrupted after {module.global_step} updates{'' if saved else ', unsaved'}; "
            f"continue with: python -m powerflow_lit.train resume={run_dir}"
        )
        raise Stopped(number) from error
    except Exception as error:
        ending |= {"status": "failed", "error": str(root_cause(error)) or type(error).__name__}
        raise
    finally:
        with signals.deferred():
            data.close()
            for callback in callbacks:
                getattr(callback, "stop", lambda: None)()
            ending["warnings"] = warnings_of(callbacks)
            summary = _summary(config, module, data, evaluation, clock, ending)
            if first:
                _write_summary(run_dir, summary)
                if config.logger.name == "wandb":
                    _finish_wandb(loggers[-1], summary)
            watch.end_others()
    signals.check()  # one that came meanwhile ends a sweep as well
    return summary


def _loggers(config: TrainConfig, run_dir: Path, point: ResumePoint | None) -> list[Any]:
    """Those of the first rank, and its files without what the checkpoint does not hold."""
    if point is not None:
        set_damaged_aside(point)
    run_folder.cut_samples(run_dir, point.refills if point else 0)
    run_folder.cut_problems(run_dir, point.refills if point else -1)
    loggers: list[Any] = [MetricsCsv(run_dir, keep_until=point.updates if point else None)]
    if config.logger.name == "wandb":
        loggers.append(build_wandb(config, run_dir))
    return loggers


def _watch(
    trainer: L.Trainer, callbacks: Sequence[L.Callback], signals: StopSignals, run_dir: Path
) -> Watch:
    """Looks after the other ranks, which are also passed the signals that come here."""
    watch = Watch(trainer, f"continue with: python -m powerflow_lit.train resume={run_dir}")
    if trainer.world_size > 1:
        # Lightning's own would talk to the other ranks from within the signal's handler, amid
        # whatever they are told by others; `StopWhereSafe` does it between updates
        trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # type: ignore[method-assign]
        signals.pass_on = watch.pass_on
    for callback in callbacks:
        if isinstance(callback, StopWhereSafe):
            callback.watch = watch
    return watch


def begin(run_dir: Path, config: TrainConfig, overrides: Sequence[str]) -> None:
    """Write what the run is told now; what an earlier start in the folder came to is past."""
    run_folder.write_configs(run_dir, as_dict(config), overrides)
    (run_dir / "summary.json").unlink(missing_ok=True)


def _resume_point(config: TrainConfig, run_dir: Path) -> ResumePoint | None:
    """The checkpoint to go on from; None for a run that begins.

    Raises:
        ConfigError, CheckpointError: see `run`.
    """
    refuse_another_run(run_dir, config.resume)
    if not config.resume:
        return None
    point = checkpoint_of(run_dir)
    if point is None:
        if (run_dir / "config.yaml").exists():
            print(f"resume: {run_dir} has no checkpoint yet, so the run begins anew")
        return None
    refuse_another(point, chosen_identity(config), force=config.resume_force)
    print(f"resume: from {point.path.name} after {point.refills} refills, {point.updates} updates")
    for line in changed_settings(run_dir, config):
        print(f"resume: changed {line}")
    return point


def how_to_go_on(run_dir: Path) -> str:
    """What a run whose disk is full has to say."""
    if not (run_dir / "overrides.yaml").exists():
        return "Nothing was begun: free some space, then run the same command again"
    stands = (run_dir / "checkpoints" / LAST).exists()
    found = f"checkpoints/{LAST} stands as it was" if stands else "There is no checkpoint yet"
    return f"{found}: free some space, then python -m powerflow_lit.train resume={run_dir}"


def _write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json; where a run that failed cannot write it, a line says so.

    Raises:
        DiskError: it cannot be written, and all else went well.
    """
    try:
        with explained(lambda: how_to_go_on(run_dir)):
            run_folder.write_summary(run_dir, summary)
    except DiskError as error:
        if summary["status"] in ("finished", "diverged"):
            raise
        print(f"warning: not written either: {error.__cause__}", file=sys.stderr)


def _push(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Upload the export where that is asked for; what summary.json says of it."""
    repo = config.callbacks.push_to_hub
    if repo is None:
        return {}
    print(f"pushing {run_dir / 'export'} to {repo}")
    failure = push(run_dir / "export", repo, private=config.callbacks.push_private)
    if failure is not None:
        print(
            f"warning: not pushed to {repo}: {failure} "
            f"(later: hf upload {repo} {run_dir / 'export'})",
            file=sys.stderr,
        )
    return {"push_to_hub": {"repo": repo, "error": failure}}


def _summary(
    config: TrainConfig,
    module: PowerFlowModule,
    data: RolloutDataModule,
    evaluation: Evaluation,
    clock: PhaseClock,
    ending: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        **ending,
        "task": config.task.name,
        "model": config.model.name,
        "finetune": config.finetune.kind,
        "strategy": config.strategy.name,
        "supervised": config.strategy.supervised,
        "uses_alpha": config.strategy.uses_alpha,
        "alpha": config.alpha,
        # of a schedule with a target: where it stands, and what the last refill has reached
        "automatic_alpha": automatic_alpha(module),
        "epsilon": config.epsilon,
        "seed": config.seed,
        "refills": data.buffer.refill + 1,
        "steps": module.global_step if module._trainer is not None else 0,
        "skipped_steps": module.skipped_steps,
        "engine_rebuilds": data.engine_rebuilds,
        "engine_logp_gap": {
            name: data.refill_metrics.get(f"selfcheck/engine_logp_gap{suffix}")
            for name, suffix in (("max", ""), ("mean", "_mean"))
        },  # nats a token, of the last refill
        "base": evaluation.base,
        "base_decodings": evaluation.base_decodings,
        "final": evaluation.final,
        "wall_s": round(clock.wall, 2),
        "phases": {name: round(seconds, 2) for name, seconds in clock.total.items()},
        "tokens": data.tokens_generated,
        "versions": run_folder.versions(),
        "git_commit": run_folder.git_commit(),
    }


def automatic_alpha(module: PowerFlowModule) -> dict[str, float] | None:
    """Where a schedule with a target stands; None of others."""
    found = module.automatic
    if found is None:
        return None
    return {"alpha": found(module.alpha_value, 1.0), **found.metrics}


def _finish_wandb(logger: Any, summary: dict[str, Any]) -> None:
    """Close the W&B run, so that the next job of a multirun gets its own."""
    experiment = logger.experiment
    experiment.summary.update({k: summary[k] for k in ("status", "wall_s", "tokens")})
    experiment.finish(exit_code=0 if summary["status"] == "finished" else 1)
