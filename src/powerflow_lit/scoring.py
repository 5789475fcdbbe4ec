"""A refill's log-probs: of base and behaviour policy, and how far engine and trainer differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from powerflow_lit import ranks
from powerflow_lit.early_scoring import EarlyScores
from powerflow_lit.models.guard import removed_mass
from powerflow_lit.models.logprobs import GuardedResponse, guarded_responses, response_scores
from powerflow_lit.models.sharding import agreed, is_sharded
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.rollout import EngineError, RolloutEngine
from powerflow_lit.rollout.engine import NonFiniteRolloutError, OnFinished, Row
from powerflow_lit.rollout.metrics import log_prob_gap
from powerflow_lit.tasks.base import mean
from powerflow_lit.trajectories import own_samples
from powerflow_lit.types import AllowedTokens, TokenBatch, Trajectory

LogPOld = Literal["auto", "engine", "trainer", "none"]
Progress = Callable[[str, int, int, int], None]  # phase, done, total, tokens


@dataclass(frozen=True)
class RolloutSettings:
    """What a refill is; values stand in `conf/rollout/` and `conf/train.yaml`."""

    prompts_per_refill: int
    samples_per_prompt: int
    base_share: float  # of them, drawn from the base once the policy has left it
    max_new_tokens: int
    max_prompt_tokens: int
    log_p_old: LogPOld  # whose behaviour log-probs the buffer keeps
    overlap: bool  # a refill is sampled while the one before it is trained on
    score_while_generating: bool  # the base scores what is there while the rest is sampled
    logp_gap_trajectories: int  # rollouts on which engine and trainer are compared at each sync
    logp_gap_limit: float  # nats, largest tolerated difference of one token
    tokens_per_microbatch: int  # of the scoring passes
    logit_chunk_mb: float  # float32 logits held at once in them, MB
    guard_min_p: float  # rollouts and log-probs keep to tokens of so much of the top one's; 0: all
    shares_engine: bool  # whether several ranks hold an engine together
    min_ess: float  # effective share of the buffer's trajectories below which stale ones go

    @property
    def base_samples(self) -> int:
        """Rollouts of a prompt that are drawn from the base."""
        return round(self.base_share * self.samples_per_prompt)

    def in_step(self, model: Any) -> bool:
        """Whether others would wait, in the middle of a refill, for a rank that goes astray."""
        return self.shares_engine or is_sharded(model)


class Scorer:
    """Scores rollouts under policy and base, in the precision of training.

    Args:
        pad_id: of the batches; no log-prob depends on it.
        report: told of progress.
    """

    def __init__(self, settings: RolloutSettings, *, pad_id: int, report: Progress) -> None:
        self.settings, self.pad_id, self._report = settings, pad_id, report
        self._early: EarlyScores | None = None

    def prompts_with_log_probs(self, keep: LogPOld, *, is_first: bool) -> int | None:
        """How many prompts' responses, from the first on, must come with log-probs; None: all.

        Where none are used, those that are compared still come so from a new engine's first refill:
        they tell of its decoding, `engine.score` of its weights only. Every refill would pay for
        them as if all had been asked for (docs/performance.md).
        """
        if keep == "engine" or (keep == "auto" and self.settings.guard_min_p == 0):
            return None
        compared = self.settings.logp_gap_trajectories
        own = self.settings.samples_per_prompt - self.settings.base_samples
        return math.ceil(compared / own) if is_first else 0

    @torch.no_grad()
    def __call__(
        self,
        module: PowerFlowModule,
        engine: RolloutEngine,
        trajectories: list[Trajectory],
        refill: int,
        keep: LogPOld,
        gap: dict[str, float] | None = None,
    ) -> tuple[list[Trajectory], dict[str, float]]:
        """With base log-probs, and behaviour log-probs as `keep` says; of those drawn from the base
        the behaviour log-probs are the base's.

        Under a guard both are over the allowed tokens, which the trajectories then carry; what is
        compared with the engine is always over the full vocabulary, as the engine reports it.

        Args:
            gap: of engine and trainer, where they were compared before the policy moved on.

        Raises:
            EngineError: engine and trainer disagree on the log-probs of the rollouts.
            NonFiniteRolloutError: the trainer's are not finite.
        """
        rows, own = _rows(trajectories), own_samples(trajectories)
        if self.settings.guard_min_p > 0:
            return self._under_guard(module, engine, trajectories, refill, keep)
        in_step, early = self.settings.in_step(module.policy), self._early
        if early is None:
            log_p_base = self._base_log_probs(module, rows, "score")
        else:
            log_p_base, self._early = agreed(in_step, early.results), None
        if gap is None:
            few = own[: self.settings.logp_gap_trajectories]
            ours = self._log_probs(module, module.policy, _rows(few))
            gap = agreed(in_step, lambda: self._compared(module, engine, few, ours, refill, keep))
        else:  # the thread has added to it since it was checked
            known = gap
            agreed(in_step, lambda: self._refuse_gap(module, engine, known, refill))
        scored = [
            replace(t, log_p_base=base, log_p_old=base if t.from_base else t.log_p_old)
            for t, base in zip(trajectories, log_p_base, strict=True)
        ]
        if keep == "none":  # not even those that were compared: a resumed run compares others
            return _with_own(
                scored, [torch.full((t.length,), torch.nan) for t in own_samples(scored)]
            ), gap
        mean_length = mean([t.length for t in own])
        use_engine = keep == "engine" or (
            keep == "auto" and gap["selfcheck/engine_logp_gap_mean"] * mean_length < 0.01
        )
        if is_sharded(module.policy):  # the pass is one of all ranks or of none
            use_engine = not ranks.greatest(int(not use_engine))
        if not use_engine:
            found = self._log_probs(module, module.policy, _rows(own))
            agreed(in_step, lambda: self._refuse_non_finite(module, found, refill))
            scored = _with_own(scored, found)
        return scored, {**gap, "rollout/log_p_old_from_engine": float(use_engine)}

    @contextmanager
    def while_generating(
        self, module: PowerFlowModule, prompts: Sequence[Sequence[int]]
    ) -> Iterator[OnFinished | None]:
        """What the generation within is to call with each prompt's responses, if anything: the
        base scores them in a thread, and `__call__` finds them scored.

        Args:
            prompts: token ids, in the order of the generation.
        """
        self._early = None
        if not self.settings.score_while_generating:
            yield None
            return
        with EarlyScores(prompts, lambda rows: self._base_log_probs(module, rows)) as early:
            yield early.add
        self._early = early

    def check(
        self,
        module: PowerFlowModule,
        engine: RolloutEngine,
        trajectories: Sequence[Trajectory],
        refill: int,
    ) -> dict[str, float]:
        """Let the engine score trajectories that the policy scores too; how far they differ.

        Raises:
            EngineError: they disagree on the log-probs of the same tokens.
            NonFiniteRolloutError: the trainer's are not finite.
        """
        rows = _rows(own_samples(trajectories)[: self.settings.logp_gap_trajectories])
        ours = self._log_probs(module, module.policy, rows)
        theirs = [torch.tensor(row) for row in engine.score(rows)]
        return self._gap(module, engine, ours, theirs, refill)

    @torch.no_grad()
    def check_base(
        self, module: PowerFlowModule, engine: RolloutEngine, rows: Sequence[Row], refill: int
    ) -> dict[str, float]:
        """The same for the base, whose weights the engine holds; nothing where the trainer's copy
        computes in another type (model.base_dtype), so that the two must differ.

        Raises:
            EngineError, NonFiniteRolloutError: see `check`.
        """
        with module.frozen.model() as base:
            if base.dtype != module.policy.dtype:
                return {}
            rows = rows[: self.settings.logp_gap_trajectories]
            ours = self._log_probs(module, base, rows)

        def compared() -> dict[str, float]:
            theirs = [torch.tensor(row) for row in engine.score(rows)]
            return self._gap(module, engine, ours, theirs, refill, of="the base's")

        gap = agreed(self.settings.in_step(module.policy), compared)
        return {"selfcheck/base_logp_gap": gap["selfcheck/engine_logp_gap"]}

    def policy_log_probs(
        self, module: PowerFlowModule, trajectories: Sequence[Trajectory]
    ) -> list[torch.Tensor]:
        """Of the policy as it is now, over the tokens that each trajectory allows, (L,) nats."""
        allowed = [t.allowed for t in trajectories if t.allowed is not None]
        rows = _rows(trajectories)
        return self._log_probs(module, module.policy, rows, "score", allowed or None)

    def _compared(
        self,
        module: PowerFlowModule,
        engine: RolloutEngine,
        few: Sequence[Trajectory],
        ours: Sequence[torch.Tensor],
        refill: int,
        keep: LogPOld,
    ) -> dict[str, float]:
        """The gap on a few trajectories, as they were sampled or as the engine scores them.

        Where only a new engine's first refill comes with log-probs, those are compared and not
        logged: a run that was stopped and resumed logs what one never touched does.
        """
        sampled = [t.log_p_old for t in few]
        known = not any(bool(row.isnan().any()) for row in sampled)
        if known and self.prompts_with_log_probs(keep, is_first=False) is None:
            return self._gap(module, engine, ours, sampled, refill)
        theirs = [torch.tensor(row) for row in engine.score(_rows(few))]
        if known:
            self._gap(module, engine, ours, sampled, refill)
        return self._gap(module, engine, ours, theirs, refill)

    def _under_guard(
        self,
        module: PowerFlowModule,
        engine: RolloutEngine,
        trajectories: list[Trajectory],
        refill: int,
        keep: LogPOld,
    ) -> tuple[list[Trajectory], dict[str, float]]:
        """The same over the tokens that the policy, as it is at this refill, allows."""
        rows = _rows(trajectories)
        guarded = self._guarded(module, rows)
        few = trajectories[: self.settings.logp_gap_trajectories]
        ours = [g.log_prob_full for g in guarded[: len(few)]]

        def compared() -> dict[str, float]:
            self._refuse_non_finite(module, [g.log_prob_full for g in guarded], refill)
            return self._compared(module, engine, few, ours, refill, keep)

        gap = agreed(self.settings.in_step(module.policy), compared)
        allowed = [g.allowed for g in guarded]
        with module.frozen.model() as base:
            log_p_base = self._log_probs(module, base, rows, "score", allowed)
        # the pass that finds the allowed tokens also yields the trainer's log-probs
        use_engine = keep == "engine"
        scored = [
            replace(
                t,
                log_p_base=base,
                log_p_old=g.log_prob + (t.log_p_old - g.log_prob_full if use_engine else 0.0),
                allowed=g.allowed,
            )
            for t, base, g in zip(trajectories, log_p_base, guarded, strict=True)
        ]
        outside = torch.cat([removed_mass(g.log_prob_full, g.log_prob) for g in guarded])
        return scored, {
            **gap,
            "rollout/log_p_old_from_engine": float(use_engine),
            "rollout/guard_removed_mass": float(outside.mean()),
        }

    def _guarded(self, module: PowerFlowModule, rows: Sequence[Row]) -> list[GuardedResponse]:
        """What the guard allows at each token of the responses under the policy as it is now."""
        batch = TokenBatch.collate(rows, self.pad_id).to(module.device)
        with module.trainer.precision_plugin.forward_context():
            return guarded_responses(
                module.policy,
                batch,
                min_p=self.settings.guard_min_p,
                tokens_per_microbatch=self.settings.tokens_per_microbatch,
                logit_chunk_mb=self.settings.logit_chunk_mb,
            )

    def _base_log_probs(
        self, module: PowerFlowModule, rows: Sequence[Row], report: str | None = None
    ) -> list[torch.Tensor]:
        with module.frozen.model() as base:
            return self._log_probs(module, base, rows, report)

    @torch.no_grad()
    def _log_probs(
        self,
        module: PowerFlowModule,
        model: Any,
        rows: Sequence[Row],
        report: str | None = None,
        allowed: Sequence[AllowedTokens] | None = None,
    ) -> list[torch.Tensor]:
        """Log-probs of the responses of (prompt ids, response ids) rows, in the precision of
        training, (L,) nats each; over the full vocabulary, or the allowed tokens."""
        done = 0

        def count(rows_done: int) -> None:
            nonlocal done
            done += rows_done
            if report is not None:
                self._report(report, done, len(rows), 0)

        batch = TokenBatch.collate(rows, self.pad_id, allowed).to(module.device)
        # a run that is asked to stop may not raise amid passes of all ranks
        in_step = self.settings.in_step(model)
        with module.trainer.precision_plugin.forward_context():
            scores = response_scores(
                model,
                batch,
                tokens_per_microbatch=self.settings.tokens_per_microbatch,
                logit_chunk_mb=self.settings.logit_chunk_mb,
                on_progress=None if in_step else count,
            )
        if in_step:
            agreed(in_step, lambda: count(len(rows)))
        log_prob = scores.log_prob.float().cpu()
        # copies: a view would take the whole matrix along to other ranks and into checkpoints
        found = zip(log_prob, rows, strict=True)
        return [row[: len(response)].clone() for row, (_, response) in found]

    def _gap(
        self,
        module: PowerFlowModule,
        engine: RolloutEngine,
        ours: Sequence[torch.Tensor],
        theirs: Sequence[torch.Tensor],
        refill: int,
        of: str = "the policy's",
    ) -> dict[str, float]:
        """Differences between the trainer's log-probs and the engine's on the same trajectories."""
        self._refuse_non_finite(module, ours, refill)
        greatest, average = log_prob_gap(ours, theirs)
        gap = {"selfcheck/engine_logp_gap": greatest, "selfcheck/engine_logp_gap_mean": average}
        self._refuse_gap(module, engine, gap, refill, of)
        return gap

    def _refuse_gap(
        self,
        module: PowerFlowModule,
        engine: RolloutEngine,
        gap: dict[str, float],
        refill: int,
        of: str = "the policy's",
    ) -> None:
        greatest = gap["selfcheck/engine_logp_gap"]
        if greatest <= self.settings.logp_gap_limit:
            return
        dtypes = (
            f"engine {engine.name} in {engine.dtype}, "
            f"trainer in {str(module.policy.dtype).removeprefix('torch.')} "
            f"with precision {module.trainer.precision}"
        )
        raise EngineError(
            f"refill {refill}: engine and trainer disagree by {greatest:.4f} nats on a token "
            f"of the {self.settings.logp_gap_trajectories} trajectories that both scored, "
            f"{gap['selfcheck/engine_logp_gap_mean']:.4f} on "
            f"average (limit {self.settings.logp_gap_limit:g}; {dtypes}): the rollouts are not "
            f"{of}. Check model.engine_dtype against model.dtype, or raise "
            "rollout.logp_gap_limit"
        )

    def _refuse_non_finite(
        self, module: PowerFlowModule, ours: Sequence[torch.Tensor], refill: int
    ) -> None:
        broken = sum(not bool(row.isfinite().all()) for row in ours)
        if broken:
            raise NonFiniteRolloutError(
                f"refill {refill}, after update {module.global_step}: the trainer's own log-probs "
                f"are NaN or infinite in {broken} of {len(ours)} trajectories, though the "
                "engine's are not: its activations overflow; try a lower optimizer.lr, or "
                "trainer.precision=32-true"
            )


def _rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    return [(t.prompt_ids, t.response_ids) for t in trajectories]


def _with_own(
    trajectories: Sequence[Trajectory], log_p_old: Sequence[torch.Tensor]
) -> list[Trajectory]:
    """The same with these behaviour log-probs for those that the policy has sampled."""
    given = iter(log_p_old)
    return [t if t.from_base else replace(t, log_p_old=next(given)) for t in trajectories]
