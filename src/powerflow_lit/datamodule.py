"""Rollouts as data: before every epoch the buffer is refilled from the generation engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit import ranks
from powerflow_lit.clock import PhaseClock
from powerflow_lit.models.prompting import Route, encode_prompts
from powerflow_lit.models.sharding import agreed
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.prompt_order import prompts_of, usable_prompts
from powerflow_lit.rewarding import Rewarder, RewardSettings
from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.rollout.ahead import Ahead, Groups, Sampled, joined
from powerflow_lit.rollout.buffer import Updates
from powerflow_lit.rollout.engine import OnFinished, seed_from
from powerflow_lit.rollout.metrics import pooled, rollout_metrics
from powerflow_lit.rollout.rebuilding import RebuildingEngine
from powerflow_lit.run_engine import EngineFactory, RunEngine
from powerflow_lit.scoring import LogPOld, Progress, RolloutSettings, Scorer
from powerflow_lit.staleness import part_with_outlived, stale_ratios
from powerflow_lit.tasks.base import Task
from powerflow_lit.trajectories import (
    own_samples,
    refuse_stale,
    refuse_unknown,
    trajectories_of,
)
from powerflow_lit.types import Prompt, Sampling, Trajectory, TrajectoryBatch


class RolloutDataModule(L.LightningDataModule):
    """Refills a replay buffer before each epoch; an epoch is the updates of one refill.

    Lightning calls `train_dataloader` before every epoch (`reload_dataloaders_every_n_epochs=1`),
    and twice after a resume: a refill already in the buffer is not made again.

    With `settings.overlap` the next refill is sampled in a thread while this one is trained on,
    from the weights that this one's training begins with: refills 0 and 1 from the first weights,
    refill r from those after the updates of refill r - 2. Whoever asks for the engine waits for it.

    On several ranks each samples and scores its share of a refill's prompts, and then holds the
    whole refill: buffer, metrics and updates are those of a run in one process.

    Args:
        task: prompts and format check; its references are read by the accuracy probe only.
        engine_factory: builds the engine, once Lightning has set up the devices.
        prompt_route: `plain` text, `chat` template, or `auto`, which takes what there is.
        seed: of the prompt order and of sampling; refill r depends on (seed, r) alone.
        clock: where the seconds of rollout, scoring and sync are added up.
        reward: of the strategy, where it takes one.
    """

    def __init__(
        self,
        *,
        task: Task,
        tokenizer: Tokenizer,
        engine_factory: EngineFactory,
        buffer: ReplayBuffer,
        settings: RolloutSettings,
        prompt_route: Route,
        seed: int,
        clock: PhaseClock,
        reward: RewardSettings | None = None,
    ) -> None:
        super().__init__()
        self.task, self.tokenizer, self.buffer = task, tokenizer, buffer
        self.settings, self.seed, self.clock = settings, seed, clock
        self.prompt_route = prompt_route
        self.pad_id = int(tokenizer.pad_token_id)
        self.refill_metrics: dict[str, float] = {}
        self.tokens_generated = self.tokens_of_refill = 0
        self._made_before = (-1, 0)  # refill of the checkpoint, and its updates made by then
        self.on_progress: Progress | None = None
        self.on_warning: Callable[[str], None] | None = None  # told what the run should remember
        self._scorer = Scorer(settings, pad_id=self.pad_id, report=self._report)
        self._rewarder = Rewarder(reward, task, settings, pad_id=self.pad_id, report=self._report)
        self._ahead = Ahead(self._waiting, lambda why: self._module.print(f"warning: {why}"))
        self._held = RunEngine(
            engine_factory,
            module=lambda: self._module,
            settle=self._ahead.settle,
            clock=clock,
            on_rebuild=self._note_rebuild,
        )
        self._trained_from = -1  # updates made as the newest refill's training began
        self._done_at = 0.0  # when this rank had its share of a refill
        self.train_prompts, self._prompt_ids = self._usable_prompts(
            "training", task.train_prompts(), settings.prompts_per_refill
        )
        self.eval_prompts, _ = self._usable_prompts("evaluation", task.eval_prompts(), 1)

    @property
    def engine(self) -> RebuildingEngine:
        """The engine, as soon as nothing is sampled in a thread any more."""
        return self._held.get()

    @property
    def engine_rebuilds(self) -> int:
        """How often it was built anew."""
        return self._held.rebuilds

    @property
    def _module(self) -> PowerFlowModule:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, PowerFlowModule)
        return module

    def train_dataloader(self) -> Updates:
        """The updates until the next refill, which is made first unless the buffer holds it.

        After a resume those that the checkpoint has made of this refill are left out.
        """
        trainer = self.trainer
        assert trainer is not None
        epoch, last = trainer.current_epoch, (trainer.max_epochs or 0) - 1
        if self.buffer.refill != epoch and epoch <= last:  # past the last, Lightning asks in vain
            self.refill(epoch)
        if self.settings.overlap and epoch < last:
            ranks.gathered(lambda: self._sample_ahead(epoch + 1))
        self.rest_engine()
        if self.keeps_log_p_old != "none":
            refuse_unknown(self.buffer)
        refill, made = self._made_before
        start = made if refill == self.buffer.refill else 0
        return Updates(self.buffer.updates(self.pad_id), start)

    def refill(self, index: int) -> None:
        """Sample refill `index`, score it under the base and store it.

        Raises:
            EngineError: engine and trainer disagree on the log-probs of the rollouts, or some
                were sampled from other weights than they may be.
            DivergedError: weights or log-probs are not finite.
        """
        module = self._module
        if not self._held.is_built:  # what several ranks build, they build at once
            ranks.gathered(lambda: self.engine.name)
        shares = ranks.gathered(lambda: self._refill_share(index))
        self._wait_over()
        trajectories = [t for own, _ in shares for t in own]
        trained = self._rewarder.trained(trajectories)
        min_ess = self.settings.min_ess
        with self.clock("score"):
            ratios = stale_ratios(self.buffer, self._scorer, module, index) if min_ess else {}
        self.buffer.add(trained, index)  # nothing after it may be stopped half-way
        self._ahead.used()
        self._trained_from = module.global_step
        if index == 0 or module.length_control.is_on:
            fresh = TrajectoryBatch.collate(own_samples(trained), self.pad_id).to(module.device)
            (module.calibrate if index == 0 else module.price_length)(fresh)
        self.tokens_of_refill = sum(t.length for t in trajectories)
        self.tokens_generated += self.tokens_of_refill
        scoring = pooled([(found, sum(t.length for t in own)) for own, found in shares])
        own = own_samples(trajectories)
        self.refill_metrics = {**rollout_metrics(own), **scoring}
        if self.settings.base_share:
            self.refill_metrics["rollout/base_share"] = 1 - len(own) / len(trajectories)
        if min_ess:
            self.refill_metrics |= part_with_outlived(self.buffer, ratios, min_ess=min_ess)

    def _refill_share(self, index: int) -> tuple[list[Trajectory], dict[str, float]]:
        """This rank's prompts of a refill: their trajectories, scored, and what scoring found."""
        module, keep, rebuilds = self._module, self.keeps_log_p_old, self.engine_rebuilds
        prompts, first = self._own_prompts(index)
        oldest = self._trained_from if self.settings.overlap else module.global_step
        in_step = self.settings.in_step(module.policy)
        with self.clock("rollout"):
            sampled = agreed(in_step, lambda: self._ahead.of(index))
        if in_step and ranks.greatest(int(sampled is None)):
            sampled = None  # it failed on one of them: all sample anew
        ahead = sampled is not None
        if sampled is None:
            sampled = self._sample(index, prompts)
        with self.clock("score"):
            trajectories = agreed(in_step, lambda: self._trajectories(prompts, first, sampled))
            version = module.global_step
            refuse_stale(trajectories, index + 1, oldest=max(oldest, 0), newest=version)
            trajectories, scoring = self._scorer(
                module, self.engine, trajectories, index + 1, keep, sampled.gap if ahead else None
            )
            trajectories = self._rewarder(module, trajectories)
        self._held.is_new = self.engine_rebuilds != rebuilds  # then nothing of it was compared
        self._done_at = time.perf_counter()
        return trajectories, {
            **sampled.gap,
            **scoring,
            "rollout/engine_rebuilds": float(self.engine_rebuilds),
            "rollout/staleness": float(ahead),
        }

    def _wait_over(self) -> None:
        """The other ranks have their shares too: waiting for them is a part of the rollout."""
        if ranks.world_size() > 1:
            self.clock.add("rollout", time.perf_counter() - self._done_at)

    @property
    def keeps_log_p_old(self) -> LogPOld:
        """Whose behaviour log-probs this run keeps.

        `auto` is none where the objective does not use them and trajectories are only trained on
        right after they were sampled: then the ratios tell of no more than one refill's updates.
        """
        chosen = self.settings.log_p_old
        if chosen != "auto":
            return chosen
        if self.settings.overlap:  # a pass of the trainer would come when its weights have moved
            return "engine"
        used = self._module.uses_log_p_old or self.buffer.max_staleness > 0
        return "auto" if used or self.settings.guard_min_p > 0 else "none"

    def _sampling(self, index: int) -> Sampling:
        settings = self.settings
        return Sampling(
            settings.samples_per_prompt - self._base_samples,
            settings.max_new_tokens,
            min_p=settings.guard_min_p,
            seed=seed_from(
                random.Random(f"{self.seed}-{index}").randrange(2**31), self._own_prompts(index)[1]
            ),
            log_probs=self._scorer.prompts_with_log_probs(
                self.keeps_log_p_old, is_first=self._held.is_new
            ),
        )

    @property
    def _base_samples(self) -> int:
        """Responses of a prompt that the base is to give, which the policy still is at first."""
        return self.settings.base_samples if self._module.global_step > 0 else 0

    def _sample(self, index: int, prompts: Sequence[Prompt]) -> Sampled:
        """The responses of a refill from the policy's present weights, and from the base's."""
        ids, sampling = [self._prompt_ids[p.id] for p in prompts], self._sampling(index)
        of_base, gap = self._sample_base(index, ids, sampling) if self._base_samples else ([], {})
        self.sync_engine()
        with self._scorer.while_generating(self._module, ids) as on_finished:
            groups = self._generate("rollout", ids, sampling, on_finished)
        return Sampled(index, self.engine.policy_version, gap, groups, of_base)

    def _sample_base(
        self, index: int, ids: Sequence[tuple[int, ...]], sampling: Sampling
    ) -> tuple[Groups, dict[str, float]]:
        """The base's responses, with seeds of their own, and how far engine and trainer differ."""
        few = self._base_samples
        seed = sampling.seed + sampling.samples_per_prompt
        sampling = replace(sampling, samples_per_prompt=few, seed=seed, log_probs=0)
        with self._held.as_base():
            groups = self._generate("rollout of the base", ids, sampling, None)
            rows = [(p, c.token_ids) for p, own in zip(ids, groups, strict=True) for c in own]
            with self.clock("score"):
                gap = self._scorer.check_base(self._module, self.engine, rows, index + 1)
        return groups, gap

    def _generate(
        self,
        phase: str,
        ids: Sequence[tuple[int, ...]],
        sampling: Sampling,
        on_finished: OnFinished | None,
    ) -> Groups:
        total = len(ids) * sampling.samples_per_prompt
        with self.clock("rollout"):
            return agreed(
                self.settings.in_step(self._module.policy),
                lambda: self.engine.generate(
                    ids,
                    sampling,
                    lambda done, tokens: self._report(phase, done, total, tokens),
                    on_finished=on_finished,
                ),
            )

    def _sample_ahead(self, index: int) -> None:
        """Begin to sample a refill from the weights that the training of the one before begins
        with; nothing, if that was done, or if they are past (a run that did not sample ahead)."""
        module = self._module
        if self._ahead.is_begun or module.global_step != self._trained_from:
            return
        self.sync_engine()
        with self.clock("score"):  # while both have the same weights
            gap = self._scorer.check(module, self.engine, self.buffer.newest, index + 1)
        self._ahead.begin(
            self.engine,
            [self._prompt_ids[p.id] for p in self._own_prompts(index)[0]],
            self._sampling(index),
            Sampled(index, self.engine.policy_version, gap),
            compared=self.settings.logp_gap_trajectories,
        )

    def _waiting(self, done: int, tokens: int) -> None:
        own = ranks.share(self.settings.prompts_per_refill)
        total = (own.stop - own.start) * self.settings.samples_per_prompt
        self._report("rollout", done, total, tokens)

    def sync_engine(self) -> None:
        """Give the engine the policy's weights, unless it has them."""
        self._held.sync()

    def rest_engine(self) -> None:
        """Let the engine give memory back, unless it is at work; the next sync takes it again."""
        if not self._ahead.is_begun:
            self._held.rest()

    def check_engine(self) -> None:
        """Let the engine score what the policy scores too; for syncs that no refill follows.

        Raises:
            EngineError: they disagree on the log-probs of the same tokens.
        """
        refill = self.buffer.refill + 1
        self._scorer.check(self._module, self.engine, self.buffer.newest, refill)

    def close(self) -> None:
        """Free the engine, and drop what it samples; safe to call twice."""
        self._ahead.close()
        self._held.close()

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        with self.clock("rollout"):
            ahead = self._ahead.state_dict()
        return {
            "updates_made": [self.buffer.refill, progress.processed],
            "trained_from": self._trained_from,
            "sampled_ahead": joined(ranks.gather(ahead)),
            "refill_metrics": self.refill_metrics,
            "engine_rebuilds": self.engine_rebuilds,
            "buffer": self.buffer.state_dict(),
            "tokens_generated": self.tokens_generated,
            "tokens_of_refill": self.tokens_of_refill,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict["buffer"])
        ahead = state_dict.get("sampled_ahead")
        if self.settings.overlap and ahead is not None:
            own = ahead["groups"][ranks.share(len(ahead["groups"]))]
            self._ahead.load_state_dict({**ahead, "groups": own})
        self._trained_from = state_dict.get("trained_from", -1)
        refill, made = state_dict["updates_made"]
        self._made_before = (refill, made)
        self.refill_metrics = state_dict["refill_metrics"]
        self._held.rebuilds = state_dict["engine_rebuilds"]
        self.tokens_generated = state_dict["tokens_generated"]
        self.tokens_of_refill = state_dict.get("tokens_of_refill", 0)
        self.clock.load_state_dict(state_dict["clock"])

    # --- prompts --------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Token ids of prompts, by the model's route."""
        encoded = encode_prompts(self.tokenizer, prompts, self.prompt_route)
        return [encoded[p.id] for p in prompts]

    def _usable_prompts(
        self, role: str, prompts: Sequence[Prompt], needed: int
    ) -> tuple[list[Prompt], dict[int, tuple[int, ...]]]:
        task, limit = self.task.name, self.settings.max_prompt_tokens
        return usable_prompts(role, prompts, self.encode, task=task, limit=limit, needed=needed)

    def _own_prompts(self, refill: int) -> tuple[list[Prompt], int]:
        """This rank's share of the prompts of a refill, and the number of its first."""
        count = self.settings.prompts_per_refill
        every = prompts_of(refill, self.train_prompts, count=count, seed=self.seed)
        own = ranks.share(count)
        return every[own], own.start

    def _trajectories(
        self, prompts: Sequence[Prompt], first: int, sampled: Sampled
    ) -> list[Trajectory]:
        first_group = sampled.refill * self.settings.prompts_per_refill + first
        return trajectories_of(
            sampled,
            prompts,
            self._prompt_ids,
            first_group=first_group,
            task=self.task,
            tokenizer=self.tokenizer,
        )

    def _note_rebuild(self, why: str) -> None:
        self._module.print(f"warning: {why}")
        if self.on_warning is not None:
            self.on_warning(why)

    def _report(self, phase: str, done: int, total: int, tokens: int) -> None:
        if self.on_progress is not None:
            self.on_progress(phase, done, total, tokens)
