"""`trainer=fsdp`: weights, gradients and AdamW's states spread over all ranks (FSDP2)."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from powerflow_lit import ranks
from powerflow_lit.mendable import MendableError
from powerflow_lit.models.sharding import like, part_of
from powerflow_lit.shard_files import PREFIX, file_of, read_part, shard_folder


class ShardedCheckpointError(MendableError, ValueError):
    """A checkpoint cannot be spread over this run's ranks; one line says why."""


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with every rank in the data-parallel group.

    The module spreads policy and base itself, in `configure_model`. Checkpoints are a small file
    of rank 0 and a folder with a file of each rank (`shard_files`); no rank ever holds more of
    weights and optimizer states than its own part.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    # --- what a checkpoint holds of this rank -----------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, spread tensors still spread; `save_checkpoint` takes the parts."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        return {**state, "state": _mapped(state["state"], lambda _, value: part_of(value))}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {
            name: like(value, own[name]) if isinstance(value, Tensor) and name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]

            def spread(index: int, value: Tensor, of: list[Any] = parameters) -> Tensor:
                # the count of steps is no part of a tensor
                return like(value, of[index]) if value.dim() else value

            optimizer.load_state_dict({**state, "state": _mapped(state["state"], spread)})

    # --- files ----------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write every rank's part, then rank 0's `filepath`, which names them.

        Raises:
            OSError: the disk did not take a file, on every rank; nothing of it is left.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files: storage_options does nothing")
        path = Path(self.broadcast(filepath))
        folder = path.parent / self.broadcast(f"{PREFIX}{uuid.uuid4().hex[:12]}")
        weights = checkpoint.pop("state_dict")
        part = {
            "folder": folder.name,
            "rank": self.global_rank,
            "spread": [name for name, value in weights.items() if isinstance(value, DTensor)],
            "state_dict": {name: part_of(value) for name, value in weights.items()},
            "optimizer_states": checkpoint.pop("optimizer_states"),
        }
        file = file_of(folder, self.global_rank)
        try:
            sizes = ranks.gathered(lambda: self._write(part, file))
            shards = {"folder": folder.name, "bytes": sizes}
            main = {**checkpoint, "state_dict": {}, "shards": shards}
            ranks.gathered(lambda: self.is_global_zero and self._write(main, path))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """The checkpoint with this rank's part of weights and optimizer states.

        Raises:
            ShardedCheckpointError: it is of another number of ranks, or not spread, or damaged.
        """
        path = Path(self.broadcast(checkpoint_path))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        folder = shard_folder(path, state)
        if folder is None:
            raise ShardedCheckpointError(
                f"{path} was not written with trainer=fsdp: resume it with the trainer of before"
            )
        before = len(state["shards"]["bytes"])
        if before != self.world_size:
            raise ShardedCheckpointError(
                f"{path} is of {before} ranks, this run has {self.world_size}: resume it with "
                f"trainer.devices times trainer.num_nodes = {before}"
            )
        part = self._own_part(folder)
        return {**state, **{name: part[name] for name in ("state_dict", "optimizer_states")}}

    def _own_part(self, folder: Path) -> dict[str, Any]:
        part: dict[str, Any] = {}

        def read() -> None:
            try:
                part.update(read_part(folder, self.global_rank))
            except Exception as error:  # damage comes as an error of zip, pickle or torch
                reason = str(error).splitlines()[0]
                raise ShardedCheckpointError(
                    f"{file_of(folder, self.global_rank)} cannot be read ({reason}): go on from "
                    "previous.ckpt by renaming it to last.ckpt"
                ) from error

        ranks.gathered(read)
        return part

    def _write(self, part: dict[str, Any], file: Path) -> int:
        """Its size, in bytes, when it is on the disk."""
        self.checkpoint_io.save_checkpoint(part, file)
        for place in (file, file.parent):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return file.stat().st_size


def _mapped(states: Mapping[int, Mapping[str, Any]], change: Any) -> dict[int, dict[str, Any]]:
    """An optimizer's states by parameter, every tensor changed."""
    return {
        index: {k: change(index, v) if isinstance(v, Tensor) else v for k, v in state.items()}
        for index, state in states.items()
    }
