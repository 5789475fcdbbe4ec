"""Base log-probs of responses that are there, in a thread, while the engine samples the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from powerflow_lit.rollout.engine import Row
from powerflow_lit.types import Completion

Score = Callable[[Sequence[Row]], list[Tensor]]  # log-probs of each response, (L,) nats


class EarlyScores:
    """`with EarlyScores(...) as early: engine.generate(..., on_finished=early.add)`.

    Each prompt's responses are scored in a pass of their own, so that no number depends on the
    order in which prompts finish, nor on what else the machine does.

    Args:
        prompts: token ids of each prompt, in the order in which the engine is given them.
        score: called in the thread, for one prompt's responses at a time.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], score: Score) -> None:
        self._prompts, self._score = prompts, score
        self._parts: dict[int, Future[list[Tensor]]] = {}
        # a new thread would work with as many threads as there are cores
        self._thread = ThreadPoolExecutor(
            1, "scoring", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )

    def add(self, number: int, group: Sequence[Completion]) -> None:
        """Prompt `number` has all its responses; once more if an engine built anew says so."""
        if number in self._parts:
            self._parts[number].cancel()
        rows = [(self._prompts[number], c.token_ids) for c in group]
        self._parts[number] = self._thread.submit(self._score, rows)

    def results(self) -> list[Tensor]:
        """Log-probs of all responses in the order of the prompts, as soon as they are there.

        Raises:
            Exception: what a pass has raised.
        """
        try:
            return [row for _, part in sorted(self._parts.items()) for row in part.result()]
        finally:
            self._thread.shutdown()

    def __enter__(self) -> EarlyScores:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What was handed in is still scored, unless the sampling was broken off."""
        self._thread.shutdown(wait=error is not None, cancel_futures=error is not None)
