"""What a person sees: progress while it runs, a line per refill, a table at the end."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from powerflow_lit.callbacks import Evaluation, StepMetrics
from powerflow_lit.config.secrets import hide_in_output
from powerflow_lit.datamodule import RolloutDataModule
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.terminal import wide_console as wide_console

# columns of a refill's line: (label, metric, format)
LINE = (
    ("length", "rollout/length_mean", "5.1f"),
    ("format", "rollout/format_rate", ".2f"),
    ("repetition", "rollout/repetition", ".3f"),
    ("correct", "rollout/accuracy", ".2f"),
)
GAP_SHOWN = 0.001  # nats; of two float32 models it is a thousand times less
# rows of the final table, where the task reports them
FINAL = (
    "pass@1", "avg@", "pass@", "maj@", "quality", "modes@", "unique_valid@", "length_mean",
    "format_rate", "repetition", "diversity_semantic", "vendi", "self_bleu", "distinct_n",
)  # fmt: skip


class RefillProgress(Callback):
    """A live bar on a terminal, and one line for every few refills anywhere."""

    def __init__(
        self, steps: StepMetrics, evaluation: Evaluation, *, every_n_refills: int, headline: str
    ) -> None:
        self.steps = steps
        self.evaluation, self.every_n_refills, self.headline = evaluation, every_n_refills, headline
        self.console = wide_console()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase, self._since, self._done = "", 0.0, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.on_progress = self.show
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                "{task.fields[note]}",
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("starting the engine", total=1, note="")
            self._progress.start()

    def show(self, phase: str, done: int, total: int, tokens: int) -> None:
        """Progress of a phase: `done` of `total` responses, `tokens` sampled so far."""
        if self._progress is None or self._task is None:
            return
        if phase != self._phase or done < self._done:
            self._phase, self._since = phase, time.perf_counter()
        self._done = done
        speed = tokens / max(time.perf_counter() - self._since, 1e-3)
        note = f"{done}/{total}" + (f"  {speed:,.0f} tok/s" if tokens else "")
        self._progress.update(self._task, description=phase, completed=done, total=total, note=note)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.show("update", batch_idx + 1, int(trainer.num_training_batches), 0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refill = trainer.current_epoch + 1
        if refill % self.every_n_refills and refill != trainer.max_epochs:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RolloutDataModule)
        assert isinstance(pl_module, PowerFlowModule)
        line = self._line(refill, trainer.max_epochs or 0, pl_module, data)
        self.console.print(line, highlight=False)

    def _line(
        self, refill: int, refills: int, module: PowerFlowModule, data: RolloutDataModule
    ) -> str:
        metrics = data.refill_metrics
        parts = [f"{name} {metrics[key]:{fmt}}" for name, key, fmt in LINE if key in metrics]
        if module.automatic is not None:
            parts.append(f"alpha {module.alpha:.2f}")
        if speed := self.steps.performance.get("perf/tokens_per_s"):
            parts.append(f"{speed:,.0f} tok/s")
        if (gap := metrics.get("selfcheck/engine_logp_gap", 0.0)) >= GAP_SHOWN:
            mean = metrics["selfcheck/engine_logp_gap_mean"]
            parts.append(f"engine gap {gap:.3f} nats (mean {mean:.4f})")
        if refill % self.evaluation.every_n_refills == 0 or refill == refills:
            value = self.evaluation.final.get(f"val/{self.headline}")
            if value is not None:
                parts.append(f"val {self.headline} {value:.3f}")
        return f"refill {refill:3d}/{refills}  " + "  ".join(parts)

    def stop(self) -> None:
        """Take the live bar away; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def teardown(self, *_: Any, **__: Any) -> None:
        self.stop()


# remarks of libraries on what we mean to do
NOISE = (
    "does not have many workers",
    "module.{0,3} in eval mode",
    "LeafSpec",
    "transfer_batch",
    "reduce_op",
    "your dataloader is not resumable",  # `buffer.Updates` is, by our own count
    "`training_step` returned `None`",
    "`parameters` is an empty generator",  # a strategy without log Z has no head to clip
)


def quiet() -> None:
    """Leave the terminal to the run's own lines, and keep secrets out of it."""
    hide_in_output()
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}")


def final_table(summary: Mapping[str, Any]) -> Table:
    """Base (every way of decoding it) against the trained policy at T=1."""
    base, final = summary["base"], summary["final"]
    columns = {"base T=1": base}
    columns |= {f"base {name}": m for name, m in summary["base_decodings"].items()}
    columns["trained T=1"] = final
    alpha = f" alpha={summary['alpha']:g}" if summary.get("uses_alpha", True) else ""
    if found := summary.get("automatic_alpha"):
        alpha += f" -> {found['alpha']:.3g}"
    supervised = " (supervised)" if summary.get("supervised") else ""
    title = (
        f"{summary['task']}, {summary['model']}: strategy={summary['strategy']}{supervised}"
        f"{alpha}, {summary['refills']} refills"
    )
    return metrics_table(title, columns)


def metrics_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """`val/` metrics side by side, a column for each way of sampling; the last one is bold."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == list(columns)[-1] else None)
    keys = list(next(iter(columns.values())))
    for wanted in FINAL:
        for key in keys:
            name = key.removeprefix("val/")
            at_k = wanted.endswith("@") and name.startswith(wanted) and name != "pass@1"
            if name == wanted or at_k:
                table.add_row(name, *(_cell(m.get(key), name) for m in columns.values()))
    return table


def phase_line(summary: Mapping[str, Any]) -> str:
    """Wall time in all and by phase, in seconds; before it, that a monitor stopped the run."""
    stopped = ""
    if summary.get("status") == "diverged":
        stopped = f"diverged after {summary['refills']} refills: see stopped_by in summary.json\n"
    phases = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["phases"].items())
    tokens = f"({summary['tokens']:,} tokens sampled)"
    return f"{stopped}wall time {summary['wall_s']:.0f} s:  {phases}  {tokens}"


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if name == "length_mean" else f"{value:.3f}"
