"""PowerFlow as a LightningModule: policy, frozen base and Z' head, with the loss as the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from powerflow_lit import ranks
from powerflow_lit.automatic_alpha import AutomaticAlpha
from powerflow_lit.flow import FlowHead
from powerflow_lit.fresh import FreshRollouts
from powerflow_lit.length_control import LengthControl
from powerflow_lit.log_z import LogZ, LogZContext
from powerflow_lit.models import sharding
from powerflow_lit.models.base import CopiedBase, FrozenBase, frozen_base
from powerflow_lit.models.checkpointing import without_dropout
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.forward_pass import prompt_states
from powerflow_lit.models.logprobs import Scores, response_scores
from powerflow_lit.models.lora import is_lora, trained_names
from powerflow_lit.objectives import (
    Alpha,
    LossInputs,
    LossOutput,
    NonFiniteInputError,
    ObjectiveError,
    group_log_z,
)
from powerflow_lit.off_policy import RAW_RATIOS, policy_metrics, ratios_unknown
from powerflow_lit.optimized_module import OptimizedModule
from powerflow_lit.random_state import random_state, restore_random_state
from powerflow_lit.types import TrajectoryBatch

Objective = Callable[..., LossOutput]
AlphaSchedule = Callable[[float, float], float]  # (alpha, progress in [0, 1]) -> alpha now
Power = TypeVar("Power", float, Tensor)


class PowerFlowModule(OptimizedModule):
    """Trains a policy towards the alpha-power of its own frozen base.

    On several ranks each is given the whole update, scores its share of the prompt groups and
    gathers the log-probs of the others: the objective sees all trajectories, as it would in one
    process, and so do its metrics. The gradient is of a rank's own rows; the strategy averages it
    over the ranks, so that the loss is multiplied by their number.

    Args:
        policy: causal language model to train, all of it or the adapter that it carries.
        objective: `(LossInputs, *, alpha, **calibration) -> LossOutput`, see `objectives`. One with
            `uses_log_z` also offers `mismatch` and `weight`, from which closed forms take log Z.
            One without `uses_log_p_old` is taken to use the behaviour log-probs. One with an
            `entropy_temperature` is given the policy's token entropies at it, one with a
            `block_size` log V of prefixes from `flow`.
        log_z: where log Z comes from; unused where the objective has none.
        alpha, alpha_schedule: the power, and how it is used over training.
        length_control: whether the mean length is chosen, for which `objective` needs a place.
        format_penalty: psi of a response without the task's format, 0 or negative.
        calibrate: keyword arguments of the objective, as numbers or as the name of a statistic of
            the first refill (`length_mean`), which is then kept in the checkpoint.
        loss_scale: constant factor on the loss (not on what is logged).
        lr ... max_skipped_in_a_row: see `OptimizedModule`.
        tokens_per_microbatch: padded tokens of one forward pass; never changes a gradient.
        logit_chunk_mb: float32 logits held at once, MB; never changes one either.
        base: p_base; None takes the policy as it is now (a copy, or its adapter switched off).
        flow: where log V comes from; unused where the objective asks for none.

    Raises:
        ObjectiveError: it asks for log V and there is no flow.
    """

    def __init__(
        self,
        *,
        policy: PreTrainedModel,
        objective: Objective,
        log_z: LogZ,
        alpha: float,
        alpha_schedule: AlphaSchedule,
        length_control: LengthControl,
        format_penalty: float,
        calibrate: Mapping[str, str | float],
        loss_scale: float,
        lr: float,
        log_z_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        warmup_steps: int,
        fused_optimizer: bool | None,
        grad_clip: float,
        log_z_grad_clip: float,
        max_skipped_in_a_row: int,
        tokens_per_microbatch: int,
        logit_chunk_mb: float,
        base: FrozenBase | None = None,
        flow: FlowHead | None = None,
    ) -> None:
        super().__init__(
            lr=lr,
            log_z_lr=log_z_lr,
            betas=betas,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            fused_optimizer=fused_optimizer,
            grad_clip=grad_clip,
            log_z_grad_clip=log_z_grad_clip,
            max_skipped_in_a_row=max_skipped_in_a_row,
        )
        self.policy = policy
        self._frozen = (base or frozen_base(policy, None),)
        self.strict_loading = not is_lora(policy)  # an adapter's checkpoint has no frozen weights
        self.uses_log_z = bool(getattr(objective, "uses_log_z", False))
        self.length_control = length_control  # which reads them too
        self.uses_log_p_old = length_control.is_on or getattr(objective, "uses_log_p_old", True)
        self.entropy_temperature = getattr(objective, "entropy_temperature", None)
        self.log_z = log_z if self.uses_log_z else LogZ()
        self.log_z.build(policy.config.get_text_config().hidden_size)
        self.block_size: int | None = getattr(objective, "block_size", None)
        if self.block_size is not None and flow is None:
            raise ObjectiveError("the objective asks for log V between blocks: set strategy.flow")
        self.flow = None if self.block_size is None else flow
        if self.flow is not None:
            self.flow.build(policy.config.get_text_config().hidden_size)
        self.objective = objective
        self.alpha_value, self.alpha_schedule = alpha, alpha_schedule
        self.automatic = alpha_schedule if isinstance(alpha_schedule, AutomaticAlpha) else None
        self.fresh = FreshRollouts()
        self.format_penalty = format_penalty
        self.calibrate_from = dict(calibrate)
        self.calibration: dict[str, float] = {}
        self.loss_scale = loss_scale
        self.tokens_per_microbatch = tokens_per_microbatch
        self.logit_chunk_mb = logit_chunk_mb
        self.on_warning: Callable[[str], None] | None = None  # told what the run should remember
        self.alpha_pull = 1.0  # share of alpha - 1 that counts; a monitor may lower it

    @property
    def base(self) -> PreTrainedModel:
        """The base's own copy; a policy with an adapter has none, see `frozen`."""
        assert isinstance(self.frozen, CopiedBase), "no copy: the base is the policy, adapter off"
        return self.frozen.copy

    @property
    def alpha(self) -> float:
        """alpha at this point of training, of prompts that have none of their own."""
        epochs = self.trainer.max_epochs if self._trainer is not None else 0
        alpha = self.alpha_schedule(self.alpha_value, self.current_epoch / max(epochs or 0, 1))
        return pulled(alpha, self.alpha_pull)

    def alpha_of(self, prompt_id: Tensor) -> Alpha:
        """alpha of trajectories of these prompts: one for all, or (N,) where each has its own."""
        own = None if self.automatic is None else self.automatic.of_prompts(prompt_id)
        return self.alpha if own is None else pulled(own, self.alpha_pull)

    def end_refill(self) -> bool:
        """Let alpha learn from the refill's fresh rollouts; whether it did.

        It does not while a monitor pulls it or log Z's head warms up before the policy moves: then
        it would only wind up.
        """
        learns = self.alpha_pull == 1 and self.global_step >= self.log_z.warmup_steps
        did = learns and self.automatic is not None and self.automatic.step(self.fresh)
        self.fresh.clear()
        return did

    # --- the method -----------------------------------------------------------------------------

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor | None:
        self.step_metrics = {}
        self._skips_this_step = False
        scores = self.policy_scores(batch)  # log pi_theta, with gradient
        self._deferred = scores.deferred
        inputs = self.with_estimates(self.loss_inputs(batch, scores.log_prob), batch, scores)
        alpha = self.alpha_of(batch.prompt_id)
        try:
            output = self.objective(inputs, alpha=alpha, **self.calibration)
        except NonFiniteInputError as error:
            self._skip_step(str(error))
            return self._no_loss()
        if not bool(output.loss.isfinite()):  # finite inputs, but a square overflows
            self._skip_step(f"the loss is {float(output.loss.detach())}")
            return self._no_loss()
        if self.automatic is not None:
            self.fresh.add(inputs, batch)
        self.step_metrics = {"loss": output.loss.detach(), **output.metrics}
        if batch.from_base is not None:
            own = policy_metrics(self.objective, inputs, output.residual, batch.from_base)
            self.step_metrics |= own
        if ratios_unknown(batch, self.global_step):
            self.step_metrics = {k: v for k, v in self.step_metrics.items() if k not in RAW_RATIOS}
        if self.uses_log_z:
            self.step_metrics["log_z_group"] = self.group_log_z(inputs, alpha)
        for name, value in self.length_control.metrics().items():
            self.step_metrics[name] = torch.tensor(value)
        return self.loss_scale * ranks.world_size() * output.loss

    def _no_loss(self) -> Tensor | None:
        """What a skipped step returns; Lightning takes no None from ranks, which wait for each
        other's gradients: theirs are 0, and dropped before the optimizer looks."""
        self._deferred = ()
        if ranks.world_size() == 1:
            return None
        if sharding.is_sharded(self.policy):  # no gradient is waited for but those of passes
            return torch.zeros((), device=self.device, requires_grad=True)
        return sum((0 * p.sum() for p in self.parameters() if p.requires_grad), start=0)  # type: ignore[return-value]

    def policy_scores(self, batch: TrajectoryBatch) -> Scores:
        """Log-probs of all responses under the policy, and states of this rank's own prompts and
        blocks if a head reads them; the gradient is of this rank's own rows."""
        pool = self.log_z.pool if self.log_z.source == "policy" else None
        tokens, rows = batch.tokens, ranks.share_of_groups(batch.prompt_index)
        scores = response_scores(
            self.policy,
            tokens if ranks.world_size() == 1 else tokens.rows(rows),
            tokens_per_microbatch=self.tokens_per_microbatch,
            logit_chunk_mb=self.logit_chunk_mb,
            pool=pool,
            entropy_temperature=self.entropy_temperature,
            block_size=self.block_size,
        )
        shape = len(batch.prompt_index), int(tokens.response_lengths.max())
        own = {"log_prob": scores.log_prob, "entropy": scores.entropy}
        every = {
            n: None if x is None else ranks.gather_rows(x, rows, shape) for n, x in own.items()
        }
        return replace(scores, **every)  # type: ignore[arg-type]

    def loss_inputs(self, batch: TrajectoryBatch, log_pf: Tensor) -> LossInputs:
        """The objective's inputs, log Z still 0. log_pf (N, T) nats.

        Behaviour log-probs that nobody kept are the policy's own, of which every ratio is 1.
        """
        old = batch.log_p_old
        return LossInputs(
            log_pf=log_pf,
            log_p_base=batch.log_p_base,
            log_p_old=torch.where(old.isnan(), log_pf.detach().to(old.dtype), old),
            mask=batch.tokens.mask,
            log_z=log_pf.new_zeros(len(log_pf)),
            format_penalty=log_pf.new_tensor(self.format_penalty) * ~batch.formatted,
            prompt_index=batch.prompt_index,
            reward=batch.reward,
            length_price=self.length_control.price(batch.prompt_id),
        )

    def with_estimates(
        self, inputs: LossInputs, batch: TrajectoryBatch, scores: Scores
    ) -> LossInputs:
        """The inputs with all that the objective asks for beside log-probs."""
        log_flow = None
        if self.flow is not None:
            assert self.block_size is not None
            assert scores.block_states is not None
            log_flow = self.flow.of_all(scores.block_states, batch, self.block_size)
        log_z = self.estimate_log_z(inputs, batch, scores)
        return replace(inputs, token_entropy=scores.entropy, log_flow=log_flow, log_z=log_z)

    def estimate_log_z(self, inputs: LossInputs, batch: TrajectoryBatch, scores: Scores) -> Tensor:
        """log Z of each trajectory's prompt, (N,) nats; zeros where the objective has none."""
        if not self.uses_log_z:
            return inputs.log_z
        mismatch, weight = self.mismatch_and_weight(inputs, self.alpha_of(batch.prompt_id))
        if next(self.log_z.parameters(), None) is None:  # a closed form: of all, on each rank
            every = inputs.prompt_index, batch.prompt_id
            return self.log_z(LogZContext(mismatch, weight, *every, None))
        # what is trained takes its gradient from this rank's rows, as the policy does
        rows = ranks.share_of_groups(batch.prompt_index)
        state = scores.prompt_state
        if self.log_z.source == "base":
            assert self.log_z.pool is not None
            with torch.no_grad(), self.frozen.model() as base:
                state = prompt_states(base, batch.tokens.rows(rows), self.log_z.pool)
        own = LogZContext(
            mismatch[rows], weight[rows], inputs.prompt_index[rows], batch.prompt_id[rows], state
        )
        return ranks.gather_rows(self.log_z(own), rows, mismatch.shape)

    @torch.no_grad()
    def mismatch_and_weight(self, inputs: LossInputs, alpha: Alpha) -> tuple[Tensor, Tensor]:
        """The objective's residual without log Z and its importance weights, (N,) each."""
        objective: Any = self.objective
        mismatch = objective.mismatch(inputs, alpha=alpha, **self.calibration)
        return mismatch, objective.weight(inputs).value

    def group_log_z(self, inputs: LossInputs, alpha: Alpha) -> Tensor:
        """Mean of the closed form of log Z over the prompts, () nats: what `log_z` should equal."""
        mismatch, weight = self.mismatch_and_weight(inputs, alpha)
        return group_log_z(mismatch, weight, inputs.prompt_index).mean()

    @torch.no_grad()
    def calibrate(self, first_refill: TrajectoryBatch) -> None:
        """Fix what the strategy takes from the first refill: constants, prices and log Z's start.

        The first refill is on-policy, so that the behaviour log-probs are the policy's own, and
        where none were kept those of the base, which the policy still is.
        """
        statistics = {"length_mean": first_refill.tokens.response_lengths.float().mean().item()}
        self.calibration = {
            name: statistics[value] if isinstance(value, str) else float(value)
            for name, value in self.calibrate_from.items()
        }
        self.price_length(first_refill)
        if self.uses_log_z:
            alpha = self.alpha_of(first_refill.prompt_id)
            mismatch, weight = self.mismatch_and_weight(self._as_sampled(first_refill), alpha)
            self.log_z.initialise(-float((weight * mismatch).sum() / weight.sum()))

    @torch.no_grad()
    def price_length(self, refill: TrajectoryBatch) -> None:
        """Set the price of length by a refill that is about to be trained on, if there is one."""
        if not self.length_control.is_on:
            return
        alpha = self.alpha_of(refill.prompt_id)
        seen = self.mismatch_and_weight(self._as_sampled(refill), alpha)
        prompts = refill.tokens.response_lengths, refill.prompt_index, refill.prompt_id
        for warning in self.length_control.observe(*seen, *prompts):
            self.print(f"warning: {warning}")
            if self.on_warning is not None:
                self.on_warning(warning)

    def _as_sampled(self, refill: TrajectoryBatch) -> LossInputs:
        old = refill.log_p_old
        return self.loss_inputs(refill, torch.where(old.isnan(), refill.log_p_base, old))

    @torch.no_grad()
    def residual(self, batch: TrajectoryBatch) -> Tensor:
        """Residuals of given trajectories under the policy as it is now, (N,), for self-checks."""
        with self.trainer.precision_plugin.forward_context():
            scores = self.policy_scores(batch)
        # judged at their own merit: no importance weight between the policy and whoever drew them
        inputs = replace(self.loss_inputs(batch, scores.log_prob), log_p_old=scores.log_prob)
        inputs = self.with_estimates(inputs, batch, scores)
        alpha = self.alpha_of(batch.prompt_id)
        return self.objective(inputs, alpha=alpha, **self.calibration).residual

    # --- state ----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.frozen.to(self.device)

    def transfer_batch_to_device(
        self, batch: TrajectoryBatch, device: torch.device, dataloader_idx: int
    ) -> TrajectoryBatch:
        return batch.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept, weights = self._checkpoint_names(), checkpoint.get("state_dict", {})
        for name in weights.keys() - kept:
            del weights[name]
        checkpoint["powerflow"] = {
            "calibration": dict(self.calibration),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "alpha_pull": self.alpha_pull,
            "automatic_alpha": None if self.automatic is None else self.automatic.state_dict(),
            "fresh": self.fresh.state_dict(),
            "length_control": self.length_control.state_dict(),
            "random_states": ranks.gather(random_state()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "shards" in checkpoint and self.device_mesh is None:
            raise ModelError("the checkpoint is spread over ranks: resume it with trainer=fsdp")
        # an adapter's checkpoint is loaded without Lightning's own check of the names
        weights = checkpoint.get("state_dict")
        if weights is not None and (differ := weights.keys() ^ self._checkpoint_names()):
            raise ModelError(
                f"the checkpoint is not of this model and finetune=: {min(differ)} is only in one"
            )
        state = checkpoint["powerflow"]
        self.calibration = dict(state["calibration"])
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.alpha_pull = state.get("alpha_pull", 1.0)
        if self.automatic is not None and (before := state.get("automatic_alpha")) is not None:
            self.automatic.load_state_dict(before)
            self.fresh.load_state_dict(state["fresh"])
        self.length_control.load_state_dict(state.get("length_control", {}))
        states = state.get("random_states") or [state["random_state"]]  # of before several ranks
        self._random_state_to_restore = states[ranks.rank() % len(states)]

    def _checkpoint_names(self) -> set[str]:
        """What a checkpoint holds: all that is trained; frozen weights come from the model."""
        trained = {f"policy.{name}" for name in trained_names(self.policy)}
        return {n for n in self.state_dict() if not n.startswith("policy.") or n in trained}

    def on_train_start(self) -> None:
        without_dropout(self.policy)  # also where a resume begins in the middle of an epoch
        state = getattr(self, "_random_state_to_restore", None)
        if state is not None:
            restore_random_state(state)


def pulled(alpha: Power, share: float) -> Power:
    """alpha with `share` of its distance to 1."""
    return alpha if share == 1 else 1 + (alpha - 1) * share
