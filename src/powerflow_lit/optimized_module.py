"""How the policy and the heads beside it are updated: AdamW, clipping, and what is skipped."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from powerflow_lit.diverged import DivergedError
from powerflow_lit.flow import FlowHead
from powerflow_lit.log_z import LogZ
from powerflow_lit.models import sharding
from powerflow_lit.models.base import FrozenBase
from powerflow_lit.optimization import adamw, warmed_up


class OptimizedModule(L.LightningModule):
    """The optimizer's side of a module, which brings policy, base, log Z and the loss.

    Args:
        lr, log_z_lr, betas, weight_decay, warmup_steps: AdamW, policy and heads apart.
        fused_optimizer: whether it is one kernel for all parameters; None: where that pays.
        grad_clip, log_z_grad_clip: largest gradient norm of either.
        max_skipped_in_a_row: updates with a non-finite loss or gradient at which training ends.
    """

    policy: PreTrainedModel
    log_z: LogZ
    flow: FlowHead | None
    # in a tuple, so that it is neither a submodule, nor a parameter, nor in any checkpoint
    _frozen: tuple[FrozenBase]

    def __init__(
        self,
        *,
        lr: float,
        log_z_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        warmup_steps: int,
        fused_optimizer: bool | None,
        grad_clip: float,
        log_z_grad_clip: float,
        max_skipped_in_a_row: int,
    ) -> None:
        super().__init__()
        self.lr, self.log_z_lr, self.betas = lr, log_z_lr, betas
        self.weight_decay, self.warmup_steps = weight_decay, warmup_steps
        self.fused_optimizer = fused_optimizer
        self.grad_clip, self.log_z_grad_clip = grad_clip, log_z_grad_clip
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.step_metrics: dict[str, Tensor] = {}
        self.skipped_steps = self.skipped_in_a_row = 0
        self._skips_this_step = False
        self._deferred: tuple[sharding.Deferred, ...] = ()  # left after the loss's backward

    @property
    def frozen(self) -> FrozenBase:
        """The frozen base, p_base: `with module.frozen.model() as base: ...`."""
        return self._frozen[0]

    @property
    def heads(self) -> nn.ModuleList:
        """What is trained beside the policy, at a rate of its own."""
        return nn.ModuleList([self.log_z] if self.flow is None else [self.log_z, self.flow])

    @property
    def is_healthy(self) -> bool:
        """Whether a checkpoint of this state is worth keeping: the last update was not skipped,
        and everything that is trained is finite, as far as this rank holds it."""
        trained = (sharding.part_of(p) for p in self.parameters() if p.requires_grad)
        return self.skipped_in_a_row == 0 and all(bool(p.isfinite().all()) for p in trained)

    def configure_model(self) -> None:
        """Spread policy and base over the ranks where the strategy has a mesh (`trainer=fsdp`)."""
        if self.device_mesh is None or sharding.is_sharded(self.policy):
            return
        self.trainer.precision_plugin.convert_module(self)  # rounds weights while they are whole
        sharding.shard(self.policy, self.device_mesh["data_parallel"])
        self.frozen.shard(self.device_mesh["data_parallel"])

    def backward(self, loss: Tensor, *arguments: Any, **settings: Any) -> None:
        super().backward(loss, *arguments, **settings)
        for part in self._deferred:
            part.backward(self.trainer.precision_plugin.forward_context)
        self._deferred = ()
        if self.device_mesh is not None:  # the heads are whole on every rank
            sharding.average_gradients(self.heads, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        policy = [p for p in self.policy.parameters() if p.requires_grad]
        head = list(self.heads.parameters())
        groups = [{"params": policy, "lr": self.lr, "weight_decay": self.weight_decay}]
        if head:
            groups.append({"params": head, "lr": self.log_z_lr, "weight_decay": 0.0})
        plugin = self.trainer.precision_plugin if self._trainer is not None else None
        optimizer = adamw(
            groups,
            betas=self.betas,
            fused=self.fused_optimizer,
            scaled_loss=getattr(plugin, "scaler", None) is not None,
        )
        schedule = warmed_up(optimizer, hold=self.log_z.warmup_steps, warmup=self.warmup_steps)
        schedule_of = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule_of}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy and each head apart; a non-finite gradient skips the step."""
        if self._skips_this_step:  # there was no loss, and so there are no gradients, or of 0
            optimizer.zero_grad(set_to_none=True)
            return
        norm = sharding.whole(nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_clip))
        head_norm = sum(
            nn.utils.clip_grad_norm_(head.parameters(), self.log_z_grad_clip) for head in self.heads
        )
        self.step_metrics["grad_norm"] = norm
        self.step_metrics["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
        if not bool(torch.isfinite(norm + head_norm)):
            optimizer.zero_grad(set_to_none=True)  # without gradients the step changes nothing
            self._skip_step(f"the gradient norm is {float(norm + head_norm)}")
        else:
            self.skipped_in_a_row = 0

    def _skip_step(self, why: str) -> None:
        """Count an update that changes nothing: without gradients AdamW leaves all as it is.

        Raises:
            DivergedError: too many in a row.
        """
        self._skips_this_step = True
        self.log_z.undo()
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        update = self.global_step + 1
        self.print(f"update {update} skipped: {why}")
        if self.skipped_in_a_row >= self.max_skipped_in_a_row:
            raise DivergedError(
                f"{self.skipped_in_a_row} updates in a row were skipped, up to update {update} "
                f"(optimizer.max_skipped_in_a_row={self.max_skipped_in_a_row}); of the last, "
                f"{why}. Try a lower optimizer.lr, or an alpha nearer to 1"
            )
