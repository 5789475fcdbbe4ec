"""An engine whose answers are checked, and which is built anew when it has been poisoned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from powerflow_lit.rollout.engine import (
    EngineError,
    LostWeightsError,
    NonFiniteRolloutError,
    OnFinished,
    RolloutEngine,
    Row,
)
from powerflow_lit.types import Completion, Sampling

Answer = TypeVar("Answer")


class RebuildingEngine:
    """Passes everything on to an engine of its own; what comes back is whole and finite.

    NaN in vLLM's key-value cache outlives a good sync: blocks that hold it are given to the next
    requests. So the first answer that is not finite costs the engine its life: a new one is built,
    synced and asked again. Does that one answer so too, the policy itself yields NaN.

    Args:
        build: makes an engine, still without weights.
        policy: weights of the policy as it is now, and their version.
        on_rebuild: told in a line why the engine was built anew.
        may_rebuild: False where building takes all ranks of a run at once, and so ends the run.
    """

    def __init__(
        self,
        build: Callable[[], RolloutEngine],
        *,
        policy: Callable[[], tuple[Mapping[str, Tensor], int]],
        on_rebuild: Callable[[str], None],
        may_rebuild: bool = True,
    ) -> None:
        self._build, self._policy, self._on_rebuild = build, policy, on_rebuild
        self._may_rebuild = may_rebuild
        self._engine = build()

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def dtype(self) -> str:
        return self._engine.dtype

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """As any engine's.

        Raises:
            EngineError: also if the engine did not take the weights.
        """
        self._engine.sync(weights, policy_version)
        held = self._engine.policy_version
        if held != policy_version:
            raise EngineError(
                f"stale weights: the engine {self.name} was given those of update "
                f"{policy_version} and says that it holds those of {held}; its rollouts would not "
                "be the policy's"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """As any engine's.

        Raises:
            EngineError: a response without a token, or with other than one log-prob a token
                where they were asked for.
            NonFiniteRolloutError: not even a new engine's log-probs are finite.
        """

        def ask() -> list[list[Completion]]:
            return self._engine.generate(
                prompts,
                sampling,
                on_progress,
                max_new_tokens=max_new_tokens,
                on_finished=on_finished,
            )

        groups = self._finite(ask, _log_probs)
        self._refuse_torn(groups, sampling)
        return groups

    def generate_as_it_is(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[list[Completion]]:
        """The same without a new engine, which would have the weights that the policy has by now.

        Raises:
            EngineError, NonFiniteRolloutError: see `generate`; the engine may be poisoned.
        """
        groups = self._engine.generate(prompts, sampling, on_progress)
        _checked(groups, _log_probs)
        self._refuse_torn(groups, sampling)
        return groups

    def score_as_it_is(self, rows: Sequence[Row]) -> list[list[float]]:
        """`score`, without a new engine."""
        return _checked(self._engine.score(rows), list)

    def score(self, rows: Sequence[Row]) -> list[list[float]]:
        """As any engine's.

        Raises:
            NonFiniteRolloutError: not even a new engine's log-probs are finite.
        """
        return self._finite(lambda: self._engine.score(rows), list)

    def rest(self) -> None:
        self._engine.rest()

    def close(self) -> None:
        self._engine.close()

    def _finite(
        self, ask: Callable[[], Answer], log_probs: Callable[[Answer], list[Sequence[float]]]
    ) -> Answer:
        try:
            return _checked(self._with_weights(ask), log_probs)
        except NonFiniteRolloutError as error:
            wrong = str(error)  # not the error itself, whose frames hold the engine's memory
        if not self._may_rebuild:
            raise NonFiniteRolloutError(
                f"after update {self.policy_version} the engine {self.name} is poisoned: {wrong}. "
                "On several ranks it is not built anew in the run: go on with resume="
            )
        self._on_rebuild(
            f"the engine {self.name} is built anew after update {self.policy_version}: {wrong}"
        )
        self._engine.close()
        self._engine = self._build()
        self.sync(*self._policy())
        try:
            return _checked(ask(), log_probs)
        except NonFiniteRolloutError as error:
            raise NonFiniteRolloutError(
                f"after update {self.policy_version} the policy's weights are finite, but {error}, "
                f"and this from an engine {self.name} built anew too: activations overflow. "
                "Try a lower optimizer.lr, or model.dtype=float32 and model.engine_dtype=float32"
            ) from error

    def _with_weights(self, ask: Callable[[], Answer]) -> Answer:
        """The answer; an engine that has lost its weights is given them again first."""
        try:
            return ask()
        except LostWeightsError as error:
            lost = str(error)
        self._on_rebuild(f"the engine {self.name} is given its weights again: {lost}")
        self.sync(*self._policy())
        return ask()

    def _refuse_torn(self, groups: Sequence[Sequence[Completion]], sampling: Sampling) -> None:
        for number, group in enumerate(groups):
            asked = sampling.wants_log_probs(number)
            for completion in group:
                tokens, log_probs = len(completion.token_ids), len(completion.log_probs)
                if tokens == 0 or (asked and tokens != log_probs):
                    raise EngineError(
                        f"the engine {self.name} returned a response of {tokens} tokens with "
                        f"{log_probs} log-probs for prompt {number}: every response holds at least "
                        "its end-of-sequence token, and a log-prob for each"
                    )


def _log_probs(groups: list[list[Completion]]) -> list[Sequence[float]]:
    return [c.log_probs for group in groups for c in group]


def _checked(answer: Answer, log_probs: Callable[[Answer], list[Sequence[float]]]) -> Answer:
    rows = log_probs(answer)
    bad = [row for row in rows if not all(map(math.isfinite, row))]
    if bad:
        first = next(x for x in bad[0] if not math.isfinite(x))
        raise NonFiniteRolloutError(f"log-probs are {first} in {len(bad)} of {len(rows)} responses")
    return answer
