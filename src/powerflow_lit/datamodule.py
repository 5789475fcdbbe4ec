"""Rollouts as data: before every epoch the buffer is refilled from the generation engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.clock import PhaseClock
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.prompting import Route, decode, encode_prompts
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.rollout import EngineError, ReplayBuffer, RolloutEngine
from powerflow_lit.rollout.metrics import rollout_metrics
from powerflow_lit.rollout.rebuilding import RebuildingEngine
from powerflow_lit.scoring import Progress, RolloutSettings, Scorer
from powerflow_lit.tasks.base import Task, TaskError
from powerflow_lit.types import Completion, Prompt, Sampling, Trajectory, TrajectoryBatch

EngineFactory = Callable[[PowerFlowModule], RolloutEngine]


class Updates:
    """A refill's updates from the `start`-th on; its length is that of the whole refill.

    Lightning takes up an epoch in its middle, but a plain loader would begin it anew.
    """

    def __init__(self, updates: Sequence[TrajectoryBatch], start: int) -> None:
        self._updates, self._start = updates, start

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return iter(self._updates[self._start :])


class RolloutDataModule(L.LightningDataModule):
    """Refills a replay buffer before each epoch; an epoch is the updates of one refill.

    Lightning calls `train_dataloader` before every epoch (`reload_dataloaders_every_n_epochs=1`),
    and twice after a resume: a refill already in the buffer is not made again.

    Args:
        task: prompts and format check; its references are read by the accuracy probe only.
        engine_factory: builds the engine, once Lightning has set up the devices.
        prompt_route: `plain` text, `chat` template, or `auto`, which takes what there is.
        seed: of the prompt order and of sampling; refill r depends on (seed, r) alone.
        clock: where the seconds of rollout, scoring and sync are added up.
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
    ) -> None:
        super().__init__()
        self.task, self.tokenizer, self.buffer = task, tokenizer, buffer
        self.settings, self.seed, self.clock = settings, seed, clock
        self.prompt_route = prompt_route
        self.pad_id = int(tokenizer.pad_token_id)
        self.refill_metrics: dict[str, float] = {}
        self.tokens_generated = 0
        self._made_before = (-1, 0)  # refill of the checkpoint, and its updates made by then
        self.engine_rebuilds = 0
        self.on_progress: Progress | None = None
        self.on_warning: Callable[[str], None] | None = None  # told what the run should remember
        self._scorer = Scorer(settings, pad_id=self.pad_id, report=self._report)
        self._engine_factory = engine_factory
        self._engine: RolloutEngine | None = None
        self.train_prompts, self._prompt_ids = self._usable_prompts(
            "training", task.train_prompts(), settings.prompts_per_refill
        )
        self.eval_prompts, _ = self._usable_prompts("evaluation", task.eval_prompts(), 1)

    @property
    def engine(self) -> RolloutEngine:
        if self._engine is None:
            with self.clock("start"):  # of the engine; one that is built anew counts as rollout
                self._engine = RebuildingEngine(
                    lambda: self._engine_factory(self._module),
                    policy=lambda: (policy_weights(self._module.policy), self._module.global_step),
                    on_rebuild=self._note_rebuild,
                )
        return self._engine

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
        refill, made = self._made_before
        start = made if refill == self.buffer.refill else 0
        return Updates(self.buffer.updates(self.pad_id), start)

    def refill(self, index: int) -> None:
        """Sync the engine, sample, score under the base and store refill `index`.

        Raises:
            EngineError: engine and trainer disagree on the log-probs of the rollouts, or some
                were sampled from other weights than the policy's.
            DivergedError: weights or log-probs are not finite.
        """
        module, settings = self._module, self.settings
        self.sync_engine()
        prompts = self._prompts_of(index)
        sampling = Sampling(
            settings.samples_per_prompt,
            settings.max_new_tokens,
            min_p=settings.guard_min_p,
            seed=random.Random(f"{self.seed}-{index}").randrange(2**31),
        )
        total = len(prompts) * settings.samples_per_prompt
        with self.clock("rollout"):
            completions = self.engine.generate(
                [self._prompt_ids[p.id] for p in prompts],
                sampling,
                lambda done, tokens: self._report("rollout", done, total, tokens),
            )
        with self.clock("score"):
            trajectories = self._trajectories(prompts, completions, index)
            trajectories, scoring = self._scorer(module, self.engine, trajectories, index + 1)
        self._refuse_stale(trajectories, index + 1)
        self.buffer.add(trajectories, index)
        if index == 0:
            module.calibrate(TrajectoryBatch.collate(trajectories, self.pad_id).to(module.device))
        self.tokens_generated += sum(t.length for t in trajectories)
        rebuilds = {"rollout/engine_rebuilds": float(self.engine_rebuilds)}
        self.refill_metrics = {**rollout_metrics(trajectories), **scoring, **rebuilds}

    def sync_engine(self) -> None:
        """Give the engine the policy's weights, unless it has them."""
        version = self._module.global_step
        if self.engine.policy_version != version:
            with self.clock("sync"):
                self.engine.sync(policy_weights(self._module.policy), version)

    def check_engine(self) -> None:
        """Let the engine score what the policy scores too; for syncs that no refill follows.

        Raises:
            EngineError: they disagree on the log-probs of the same tokens.
        """
        refill = self.buffer.refill + 1
        self._scorer.check(self._module, self.engine, self.buffer.newest, refill)

    def close(self) -> None:
        """Free the engine; safe to call twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {
            "updates_made": [self.buffer.refill, progress.processed],
            "refill_metrics": self.refill_metrics,
            "engine_rebuilds": self.engine_rebuilds,
            "buffer": self.buffer.state_dict(),
            "tokens_generated": self.tokens_generated,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict["buffer"])
        refill, made = state_dict["updates_made"]
        self._made_before = (refill, made)
        self.refill_metrics = state_dict["refill_metrics"]
        self.engine_rebuilds = state_dict["engine_rebuilds"]
        self.tokens_generated = state_dict["tokens_generated"]
        self.clock.load_state_dict(state_dict["clock"])

    # --- prompts --------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Token ids of prompts, by the model's route."""
        encoded = encode_prompts(self.tokenizer, prompts, self.prompt_route)
        return [encoded[p.id] for p in prompts]

    def _usable_prompts(
        self, role: str, prompts: Sequence[Prompt], needed: int
    ) -> tuple[list[Prompt], dict[int, tuple[int, ...]]]:
        """Prompts within the token limit, and all prompts' token ids."""
        ids = dict(zip([p.id for p in prompts], self.encode(prompts), strict=True))
        limit = self.settings.max_prompt_tokens
        usable = [p for p in prompts if len(ids[p.id]) <= limit]
        if len(usable) < needed:
            raise TaskError(
                f"task {self.task.name} has {len(usable)} of {len(prompts)} {role} prompts within "
                f"{limit} tokens, but {needed} are needed at once: lower "
                "rollout.prompts_per_refill or raise rollout.max_prompt_tokens"
            )
        if len(usable) < len(prompts):
            dropped = len(prompts) - len(usable)
            print(f"{dropped} of {len(prompts)} {role} prompts are over {limit} tokens: dropped")
        return usable, ids

    def _prompts_of(self, refill: int) -> list[Prompt]:
        """The prompts of a refill: shuffled passes over the set, a function of (seed, refill)."""
        count, size = self.settings.prompts_per_refill, len(self.train_prompts)
        chosen: list[Prompt] = []
        orders: dict[int, list[int]] = {}
        for position in range(refill * count, (refill + 1) * count):
            lap, place = divmod(position, size)
            if lap not in orders:  # one shuffle a lap: real sets have 10^5 prompts and more
                orders[lap] = random.Random(f"{self.seed}-lap-{lap}").sample(range(size), size)
            chosen.append(self.train_prompts[orders[lap][place]])
        return chosen

    # --- trajectories ---------------------------------------------------------------------------

    def _trajectories(
        self, prompts: Sequence[Prompt], completions: Sequence[list[Completion]], index: int
    ) -> list[Trajectory]:
        none = torch.zeros(0)
        trajectories = []
        for number, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
            for completion in group:
                response = decode(self.tokenizer, completion.token_ids)
                trajectories.append(
                    Trajectory(
                        prompt=prompt,
                        group=index * self.settings.prompts_per_refill + number,
                        prompt_ids=self._prompt_ids[prompt.id],
                        response_ids=completion.token_ids,
                        response=response,
                        truncated=completion.truncated,
                        formatted=self.task.is_formatted(response),
                        correct=self.task.is_correct(prompt, response),
                        policy_version=self.engine.policy_version,
                        log_p_old=torch.tensor(completion.log_probs),
                        log_p_base=none,
                    )
                )
        return trajectories

    def _refuse_stale(self, trajectories: Sequence[Trajectory], refill: int) -> None:
        version = self._module.global_step
        stale = [t.policy_version for t in trajectories if t.policy_version != version]
        if stale:
            raise EngineError(
                f"stale weights: {len(stale)} of {len(trajectories)} trajectories of refill "
                f"{refill} were sampled from the policy of update {stale[0]}, but it has made "
                f"{version}"
            )

    def _note_rebuild(self, why: str) -> None:
        self.engine_rebuilds += 1
        self._module.print(f"warning: {why}")
        if self.on_warning is not None:
            self.on_warning(why)

    def _report(self, phase: str, done: int, total: int, tokens: int) -> None:
        if self.on_progress is not None:
            self.on_progress(phase, done, total, tokens)
