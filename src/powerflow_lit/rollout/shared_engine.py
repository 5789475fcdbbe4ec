"""One engine of several ranks: its weights lie in parts on all of them (tensor parallel).

Every rank of such a group runs the same engine program on the same requests, each with its part of
the weights, and their parts of each layer's output are added up as they go. So the group's prompts
are the union of its ranks', asked for with the seeds that each would have had alone, and each rank
takes its own responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from powerflow_lit.ranks import portable
from powerflow_lit.rollout.engine import (
    SEED_STRIDE,
    EngineError,
    OnFinished,
    RolloutEngine,
    Row,
    refuse_ranks,
)
from powerflow_lit.types import Completion, Sampling

Answer = TypeVar("Answer")


def engine_group(size: int) -> Any:
    """The neighbours of this rank, `size` of them, that share an engine; all ranks must call it.

    Its messages are objects and flags, which travel over gloo.

    Raises:
        EngineError: the ranks do not divide into such groups.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    refuse_ranks(size, world)
    own = None
    for first in range(0, world, size):
        members = list(range(first, first + size))
        group = dist.new_group(members, backend="gloo")  # by all, members or not
        own = group if dist.get_rank() in members else own
    return own


class SharedEngine:
    """Passes on to this rank's part of an engine what all ranks of its group ask, as one.

    Every method is called by all ranks of the group, in the same order. What one of them raises
    between two steps, such as a signal that stops the run, is raised on all.

    Args:
        engine: this rank's part.
        group: of `engine_group`.
    """

    def __init__(self, engine: RolloutEngine, group: Any) -> None:
        self._engine, self._group = engine, group
        self._size, self._place = dist.get_world_size(group), dist.get_rank(group)

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
        self._together(lambda: self._engine.sync(weights, policy_version))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        limits = list(max_new_tokens or [sampling.max_new_tokens] * len(prompts))
        asked = self._gather(([list(prompt) for prompt in prompts], limits, sampling))
        first = self._of_all([(len(ids), settings) for ids, _, settings in asked])
        counts = [len(ids) for ids, _, _ in asked]
        answers = self._together(
            lambda: self._engine.generate(
                [prompt for ids, _, _ in asked for prompt in ids],
                first,
                self._agreed(on_progress),
                max_new_tokens=[limit for _, own, _ in asked for limit in own],
            )
        )
        own = self._own(answers, counts)
        groups = [
            group if sampling.wants_log_probs(number) else [replace(c, log_probs=()) for c in group]
            for number, group in enumerate(own)
        ]
        for number, group in enumerate(groups):
            if on_finished is not None:  # of a rank's own, when those of all are there
                on_finished(number, group)
        return groups

    def score(self, rows: Sequence[Row]) -> list[list[float]]:
        asked = self._gather([(list(prompt), list(response)) for prompt, response in rows])
        every = [row for own in asked for row in own]
        answers = self._together(lambda: self._engine.score(every))
        return self._own(answers, [len(own) for own in asked])

    def rest(self) -> None:
        self._engine.rest()

    def close(self) -> None:
        self._engine.close()

    def _of_all(self, asked: Sequence[tuple[int, Sampling]]) -> Sampling:
        """One way of sampling for the union: the first rank's, whose seed is that of all prompts.

        Raises:
            EngineError: the ranks ask for different things.
        """
        first = asked[0][1]
        before = 0
        for count, sampling in asked:
            alike = replace(first, seed=first.seed + SEED_STRIDE * before)
            if count and replace(sampling, log_probs=first.log_probs) != alike:
                raise EngineError(
                    f"the ranks that share an engine ask for different responses: {sampling}, and "
                    f"the first of them {first}; the seeds must go by the place of a prompt among "
                    "all of theirs"
                )
            before += count
        all_or_none = {0 if sampling.log_probs == 0 else None for _, sampling in asked}
        return replace(first, log_probs=None if None in all_or_none else 0)

    def _agreed(self, on_progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """Tells this rank of its share of the progress; what one rank raises is raised on all."""

        def tell(done: int, tokens: int) -> None:
            error = None
            try:
                if on_progress is not None:
                    on_progress(done // self._size, tokens // self._size)
            except BaseException as raised:
                if getattr(raised, "at_once", False):  # nobody wants to wait for the others
                    raise
                error = raised
            failed = torch.tensor(int(error is not None))
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
            if failed:
                self._raise_first(error)

        return tell

    def _together(self, work: Callable[[], Answer]) -> Answer:
        """What `work` returns; an error that one rank ends with is raised on all."""
        answer, error = None, None
        try:
            answer = work()
        except BaseException as raised:
            if getattr(raised, "at_once", False):
                raise
            error = raised
        self._raise_first(error)
        return answer  # type: ignore[return-value]

    def _raise_first(self, error: BaseException | None) -> None:
        """Raises the error of the first rank that has one; a rank's own keeps its traceback."""
        for place, found in enumerate(self._gather(None if error is None else portable(error))):
            if found is not None:
                raise (error if place == self._place and error is not None else found) from None

    def _gather(self, value: Answer) -> list[Answer]:
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _own(self, answers: list[Answer], counts: Sequence[int]) -> list[Answer]:
        before = sum(counts[: self._place])
        return answers[before : before + counts[self._place]]
