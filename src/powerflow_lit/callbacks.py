"""What happens beside training: evaluation, self-checks, logging and samples."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from powerflow_lit import ranks
from powerflow_lit.clock import PhaseClock
from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.evaluation import evaluate, val_metrics
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.objectives import NonFiniteInputError
from powerflow_lit.rollout.buffer import pack, unpack
from powerflow_lit.rollout.engine import seed_from
from powerflow_lit.run_folder import append_problems, append_samples, sample_rows
from powerflow_lit.samplers import Decoding, EvaluationSettings
from powerflow_lit.types import Prompt, TrajectoryBatch


def log(trainer: L.Trainer, metrics: Mapping[str, float], *, step: int, refill: int) -> None:
    """The same metrics to every logger: `step` optimizer updates and `refill` refills so far.

    All ranks have the same metrics, which a monitor judges on each; the first alone writes them.
    """
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "refill": refill}, step=step)


def parts_of(trainer: L.Trainer) -> tuple[PowerFlowModule, RolloutDataModule]:
    """The module and the data of a run."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, PowerFlowModule)
    assert isinstance(data, RolloutDataModule)
    return module, data


def due(trainer: L.Trainer, every: int) -> bool:
    """Whether something that is done every so many refills is to be done at the end of this one."""
    done = trainer.current_epoch + 1
    return done % every == 0 or done == trainer.max_epochs


class StepMetrics(Callback):
    """Logs each update; rollout metrics with a refill's first, timings with its last."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock
        self.performance: dict[str, float] = {}  # of the last refill
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        module, data = parts_of(trainer)
        self.clock.add("update", time.perf_counter() - self._start)
        metrics = {f"train/{name}": float(v) for name, v in module.step_metrics.items()}
        metrics["train/alpha"] = module.alpha
        metrics["train/skipped_steps"] = module.skipped_steps
        if batch_idx == 0:
            metrics |= data.refill_metrics
        if trainer.is_last_batch:
            self.performance = self._performance(data)
            metrics |= self.performance
        log(trainer, metrics, step=trainer.global_step, refill=trainer.current_epoch + 1)

    def _performance(self, data: RolloutDataModule) -> dict[str, float]:
        lap = self.clock.lap()
        own = {f"perf/{p}_s": lap.get(p, 0.0) for p in ("rollout", "score", "update", "sync")}
        own["perf/peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        every = ranks.gather(own)
        slowest = {name: max(one[name] for one in every) for name in own}  # or the largest
        tokens = data.tokens_of_refill
        seconds = sum(value for name, value in slowest.items() if name.endswith("_s"))
        return {**slowest, "perf/tokens_per_s": tokens / max(seconds, 1e-9)}


class Evaluation(Callback):
    """Samples on the evaluation prompts at the start (the base), every few refills, at the end.

    Attributes:
        base: `val/` metrics of the base at T=1; `base_decodings` by name for other decodings.
        final: those of the policy when it was last evaluated.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_refills: int,
        max_prompts: int | None,
        settings: EvaluationSettings,
        base_decodings: Sequence[Decoding],
        clock: PhaseClock,
    ) -> None:
        self.folder = folder
        self.every_n_refills, self.max_prompts = every_n_refills, max_prompts
        self.settings, self.clock = settings, clock
        self.decodings = list(base_decodings)
        self.base: dict[str, float] = {}
        self.base_decodings: dict[str, dict[str, float]] = {}
        self.final: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.base or trainer.global_step > 0:
            return
        for decoding in self.decodings:
            if decoding.name not in self.base_decodings:  # by a run that was stopped here
                self.base_decodings[decoding.name] = self._evaluate(trainer, decoding)
        self.base = self.final = self._evaluate(trainer, Decoding(1.0))
        log(trainer, self.base, step=0, refill=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if due(trainer, self.every_n_refills):
            self.final = self._evaluate(trainer, Decoding(1.0))
            refill = trainer.current_epoch + 1
            log(trainer, self.final, step=trainer.global_step, refill=refill)

    def _evaluate(self, trainer: L.Trainer, decoding: Decoding) -> dict[str, float]:
        _, data = parts_of(trainer)
        prompts = data.eval_prompts[: self.max_prompts]
        shares = ranks.gathered(lambda: self._share(data, prompts, decoding))
        scores = [score for share in shares for score in share]
        data.rest_engine()
        if trainer.is_global_zero:
            refill = trainer.current_epoch + 1 if trainer.global_step else 0
            append_problems(self.folder, refill, decoding.name, [p.id for p in prompts], scores)
        return val_metrics(scores)

    def _share(
        self, data: RolloutDataModule, prompts: Sequence[Prompt], decoding: Decoding
    ) -> list[dict[str, float]]:
        """The scores of this rank's share of the prompts."""
        data.sync_engine()
        data.check_engine()
        own = ranks.share(len(prompts))
        prompts = prompts[own]
        if not prompts:
            return []
        settings = replace(self.settings, seed=seed_from(self.settings.seed, own.start))
        total = len(prompts) * decoding.samples_per_prompt(settings)

        def report(done: int, tokens: int) -> None:
            if data.on_progress is not None:
                data.on_progress(f"evaluation {decoding.name}", done, total, tokens)

        with self.clock("eval"):
            ids = data.encode(prompts)
            return evaluate(
                data.engine, data.tokenizer, data.task, prompts, ids, decoding, settings, report
            )

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base, "base_decodings": self.base_decodings, "final": self.final}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base, self.final = state_dict["base"], state_dict["final"]
        self.base_decodings = state_dict["base_decodings"]


class SelfCheck(Callback):
    """Spread of the residual on a fixed set of trajectories drawn from the base.

    A collapsed policy has zero residual on its own samples; only a converged one has it on the
    base's. The set is the first groups of the first refill, when the policy still was the base.
    """

    def __init__(self, *, every_n_refills: int, prompts: int) -> None:
        self.every_n_refills, self.prompts = every_n_refills, prompts
        self._trajectories: list[dict[str, Any]] = []
        self._batch: TrajectoryBatch | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = parts_of(trainer)
        if not self._trajectories:
            few = max(self.prompts, ranks.world_size())  # each rank scores one at least
            groups = sorted({t.group for t in data.buffer.newest})[:few]
            self._trajectories = [pack(t) for t in data.buffer.newest if t.group in groups]
        trajectories = [unpack(t) for t in self._trajectories]
        self._batch = TrajectoryBatch.collate(trajectories, data.pad_id).to(module.device)
        if trainer.global_step == 0:
            log(trainer, self._spread(module), step=0, refill=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if due(trainer, self.every_n_refills):
            spread = self._spread(parts_of(trainer)[0])
            log(trainer, spread, step=trainer.global_step, refill=trainer.current_epoch + 1)

    def _spread(self, module: PowerFlowModule) -> dict[str, float]:
        assert self._batch is not None
        try:
            spread = float(module.residual(self._batch).std(unbiased=False))
        except NonFiniteInputError:  # the next sync refuses such a policy, with the tensor's name
            spread = math.nan
        return {"selfcheck/residual_std_on_base": spread}

    def state_dict(self) -> dict[str, Any]:
        return {"trajectories": self._trajectories}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trajectories = state_dict["trajectories"]


class Samples(Callback):
    """A few rollouts of each refill to samples.jsonl, and to a W&B table at the end."""

    def __init__(self, folder: Path, *, per_refill: int) -> None:
        self.folder, self.per_refill = folder, per_refill

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module, data = parts_of(trainer)
        newest = data.buffer.newest
        step = max(len(newest) // max(self.per_refill, 1), 1)
        chosen = newest[::step][: self.per_refill]
        refill, psi = trainer.current_epoch + 1, module.format_penalty
        append_samples(self.folder, sample_rows(refill, chosen, psi))
        if refill == trainer.max_epochs:
            rows = sample_rows(refill, newest, psi)
            columns = list(rows[0])
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    table = [[row[c] for c in columns] for row in rows]
                    logger.log_table("samples", columns, table, step=trainer.global_step)
