"""Losses and gradients that are not numbers: what a skipped update changes, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from powerflow_lit.checkpoints import Checkpoint
from powerflow_lit.diverged import DivergedError
from powerflow_lit.log_z import EmaLogZ, GroupLogZ, LogZ
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.types import TrajectoryBatch
from tests.unit.test_module import batch, head, module

State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, and two processes lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def good(seed: int = 0) -> TrajectoryBatch:
    """Rollouts with log-probs that give a residual, others for each seed."""
    data = batch()
    noise = torch.randn(data.log_p_base.shape, generator=torch.Generator().manual_seed(seed))
    return TrajectoryBatch(**{**vars(data), "log_p_base": data.log_p_base + 0.3 * noise})


def nan_log_prob() -> TrajectoryBatch:
    data = good()
    data.log_p_base[2, 0] = float("nan")
    return data


def overflowing_loss() -> TrajectoryBatch:
    """Finite throughout, but a squared residual is beyond float32."""
    data = good()
    data.log_p_base[2, 0] = -1e30
    return data


class NanGradient(TrajectoryBatch):
    """A batch whose backward pass goes wrong, though its loss is a number."""


def nan_gradient() -> TrajectoryBatch:
    return NanGradient(**vars(good()))


class Breakable(PowerFlowModule):
    """Its gradients are NaN for a `NanGradient`, in one place, as an overflow leaves them."""

    def transfer_batch_to_device(
        self, batch: TrajectoryBatch, device: torch.device, dataloader_idx: int
    ) -> TrajectoryBatch:
        return batch

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if loss is not None and isinstance(batch, NanGradient):
            weight = next(self.policy.parameters())
            loss = loss + 0.0 * (weight[0, 0] - weight[0, 0].detach()).sqrt()  # 0 x infinity
        return loss


class States(Callback):
    """Weights, moments and rates after each update, and the loss of each."""

    def __init__(self) -> None:
        self.after: list[State] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append(state_of(trainer, pl_module))


def state_of(trainer: L.Trainer, trained: L.LightningModule) -> State:
    (optimizer,) = trainer.optimizers
    moments = {
        f"moment {number} {name}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    weights = trained.state_dict()
    means = weights.pop("log_z._extra_state", {"values": []})["values"]  # of a running estimate
    state = {**weights, **moments, "means": torch.tensor(means, dtype=torch.float64)}
    return {name: value.clone() for name, value in state.items()}


def breakable(**changes: Any) -> Breakable:
    made = module(**{"log_z": head(), "lr": 1e-2, **changes})
    made.__class__ = Breakable
    return made  # type: ignore[return-value]


def fit(
    trained: PowerFlowModule, updates: list[TrajectoryBatch], *, epochs: int = 1, **trainer: Any
) -> States:
    states = States()
    callbacks = [states, *trainer.pop("callbacks", [])]
    L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **trainer,
    ).fit(trained, DataLoader(updates, batch_size=None))  # type: ignore[arg-type]
    return states


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("log_z", [head, partial(EmaLogZ, rate=0.5, scope="global")])
@pytest.mark.parametrize("bad", [nan_log_prob, overflowing_loss, nan_gradient])
def test_a_skipped_update_changes_neither_weights_nor_moments_nor_the_next_update(
    bad: Callable[[], TrajectoryBatch],
    log_z: Callable[[], LogZ],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = breakable(log_z=log_z())
    skipping = fit(trained, [good(1), bad(), good(2)]).after
    assert same(skipping[0], skipping[1]), "bit by bit, AdamW's moments and step counts included"
    assert trained.skipped_steps == 1
    assert trained.skipped_in_a_row == 0, "the third update went well"
    assert "update 2 skipped: " in capsys.readouterr().out
    without = fit(breakable(log_z=log_z()), [good(1), good(2)]).after
    assert same(skipping[2], without[1])
    assert not same(skipping[1], skipping[2])


@pytest.mark.parametrize("bad", [nan_log_prob, nan_gradient])
def test_so_many_skipped_updates_in_a_row_end_training_as_diverged(
    bad: Callable[[], TrajectoryBatch],
) -> None:
    patient = breakable(max_skipped_in_a_row=3)
    fit(patient, [bad(), bad(), good(), bad(), bad(), good()])
    assert patient.skipped_steps == 4, "never three in a row"
    trained = breakable(max_skipped_in_a_row=3)
    words = r"3 updates in a row were skipped, up to update 4 \(optimizer.max_skipped_in_a_row=3\)"
    with pytest.raises(DivergedError, match=words):
        fit(trained, [good(), bad(), bad(), bad(), good()])
    assert all(bool(p.isfinite().all()) for p in trained.parameters())


def test_the_streak_survives_a_checkpoint_and_older_ones_have_none() -> None:
    trained = breakable(max_skipped_in_a_row=3)
    fit(trained, [good(), nan_log_prob(), nan_log_prob()])
    checkpoint: dict[str, Any] = {}
    trained.on_save_checkpoint(checkpoint)
    resumed = breakable(max_skipped_in_a_row=3)
    resumed.on_load_checkpoint(checkpoint)
    with pytest.raises(DivergedError, match="3 updates in a row"):
        fit(resumed, [nan_log_prob()])
    del checkpoint["powerflow"]["skipped_in_a_row"]
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.skipped_in_a_row == 0


def test_no_checkpoint_is_written_while_updates_are_skipped(tmp_path: Path) -> None:
    """The second epoch ends in a skipped update, the third does not."""
    kept: list[bytes] = []

    class Keep(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            path = tmp_path / "checkpoints" / "last.ckpt"
            kept.append(path.read_bytes() if path.exists() else b"")

        def on_train_end(self, *_: Any) -> None:
            self.on_train_epoch_start()

    class InEpoch1(Breakable):
        def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor | None:
            ill = self.current_epoch == 1 and batch_idx == 1
            return super().training_step(nan_log_prob() if ill else batch, batch_idx)

    trained = breakable()
    trained.__class__ = InEpoch1
    checkpoint = Checkpoint(
        tmp_path, every_n_refills=1, every_n_updates=None, keep_previous=False, identity={}
    )
    fit(trained, [good(1), good(2)], epochs=3, callbacks=[checkpoint, Keep()])
    before, first, second, third = kept
    assert before == b""
    assert first == second, "the checkpoint of the first epoch stands"
    assert third != second


def test_weights_that_are_not_numbers_are_not_healthy() -> None:
    trained = module(GroupLogZ())
    assert trained.is_healthy
    with torch.no_grad():
        next(trained.policy.parameters())[3, 1] = float("inf")
    assert not trained.is_healthy
