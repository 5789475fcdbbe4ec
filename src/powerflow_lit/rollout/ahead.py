"""A refill's responses, sampled in a thread while the trainer makes its updates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from powerflow_lit.rollout.engine import LostWeightsError, NonFiniteRolloutError
from powerflow_lit.rollout.metrics import log_prob_gap
from powerflow_lit.rollout.rebuilding import RebuildingEngine
from powerflow_lit.types import Completion, Sampling

Groups = list[list[Completion]]
POLL_S = 0.1  # between two looks at the thread


class _Dropped(Exception):  # noqa: N818 - no error: nobody waits for the responses any more
    pass


@dataclass
class Sampled:
    """What came of it."""

    refill: int
    policy_version: int  # of the weights that it was sampled from
    gap: dict[str, float]  # of engine and trainer under those weights, by metric
    groups: Groups = field(default_factory=list)
    of_base: Groups = field(default_factory=list)  # further ones, from the base; none: empty

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only, so that it loads with `weights_only=True`."""
        packed = [
            [[list(c.token_ids), list(c.log_probs), c.truncated] for c in group]
            for group in self.groups
        ]
        return {**vars(self), "gap": dict(self.gap), "groups": packed}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Sampled:
        groups = [
            [Completion(tuple(ids), tuple(log_probs), cut) for ids, log_probs, cut in group]
            for group in state["groups"]
        ]
        return cls(**{**state, "groups": groups})


def joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The ranks' parts of a refill, as one's `state_dict` says them, as one; None if any failed."""
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    groups = [group for part in whole for group in part["groups"]]
    gap = {name: max(part["gap"][name] for part in whole) for name in whole[0]["gap"]}
    return {**whole[0], "groups": groups, "gap": gap}


class _Thread:
    """Samples from the weights that the engine holds as it begins.

    What the engine draws from the global random state is undone at its end, so an update must not
    draw from it meanwhile; none does.
    """

    def __init__(
        self,
        engine: RebuildingEngine,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        found: Sampled,
        compared: int,
    ) -> None:
        self.progress = (0, 0)  # responses finished, tokens of those
        self.found = found
        self.error: BaseException | None = None
        self._engine, self._prompts, self._sampling = engine, prompts, sampling
        self._compared = compared
        self._dropped = threading.Event()
        name = f"refill {found.refill + 1}"
        self._thread = threading.Thread(target=self._sample, name=name, daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, after `timeout` seconds at most; signals are heeded meanwhile."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def drop(self) -> None:
        """End it at the next token."""
        self._dropped.set()
        self.wait()

    def _sample(self) -> None:
        try:
            groups = self._engine.generate_as_it_is(self._prompts, self._sampling, self._tick)
            rows = [
                (prompt, c.token_ids, c.log_probs)
                for prompt, group in zip(self._prompts, groups, strict=True)
                for c in group
            ][: self._compared]
            scored = self._engine.score_as_it_is([(prompt, ids) for prompt, ids, _ in rows])
            self.found.gap = _added(self.found.gap, [x for _, _, x in rows], scored)
            self.found.groups = groups
        except BaseException as error:
            self.error = error

    def _tick(self, done: int, tokens: int) -> None:
        self.progress = (done, tokens)
        if self._dropped.is_set():
            raise _Dropped


class Ahead:
    """At most one refill that is sampled, or was, before its turn has come.

    Args:
        report: called while it is waited for, with (responses finished, tokens of those).
        warn: told in a line why a refill must be sampled again.
    """

    def __init__(self, report: Callable[[int, int], None], warn: Callable[[str], None]) -> None:
        self._report, self._warn = report, warn
        self._thread: _Thread | None = None
        self._sampled: Sampled | None = None

    @property
    def is_begun(self) -> bool:
        return self._thread is not None or self._sampled is not None

    def begin(
        self,
        engine: RebuildingEngine,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        found: Sampled,
        *,
        compared: int,
    ) -> None:
        """Start to sample. Nobody else may use the engine until `settle` has returned.

        Args:
            found: what is known beforehand; its groups are filled in.
            compared: responses whose log-probs as they were sampled are compared with those that
                the engine gives to the finished text, which adds to the gap.
        """
        self._thread = _Thread(engine, prompts, sampling, found, compared)

    def settle(self) -> None:
        """Wait until nothing is sampled any more.

        Raises:
            Exception: what went wrong in the thread, unless its log-probs were not numbers or the
                engine has lost its weights; then the refill is sampled again in its turn, by a new
                engine if need be.
        """
        if self._thread is None:
            return
        while not self._thread.wait(POLL_S):
            self._report(*self._thread.progress)
        ended, self._thread = self._thread, None
        if isinstance(ended.error, NonFiniteRolloutError | LostWeightsError):
            self._warn(f"refill {ended.found.refill + 1} is sampled anew: {ended.error}")
        elif ended.error is not None:
            raise ended.error
        else:
            self._sampled = ended.found

    def of(self, refill: int) -> Sampled | None:
        """What was sampled for a refill, if it was; waits for it."""
        self.settle()
        found = self._sampled
        return found if found is not None and found.refill == refill else None

    def used(self) -> None:
        """What was sampled is in the buffer now."""
        self._sampled = None

    def close(self) -> None:
        """Drop what is being sampled."""
        if self._thread is not None:
            self._thread.drop()
            self._thread = None

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint, which lacks the weights that it is sampled from; waits for it.

        None where it failed: the run ends with its error, and a resumed one samples anew.
        """
        if self._thread is not None:
            self._thread.wait()
            failed = self._thread.error is not None
            return None if failed else self._thread.found.state_dict()
        return None if self._sampled is None else self._sampled.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Of this rank's part of the refill."""
        self._sampled = None if state is None else Sampled.of(state)


def _added(
    gap: dict[str, float], sampled: Sequence[Sequence[float]], scored: Sequence[Sequence[float]]
) -> dict[str, float]:
    """The gap between trainer and engine plus that within the engine: together at least the gap
    between the trainer and what was sampled."""
    greatest, average = log_prob_gap(map(torch.tensor, sampled), map(torch.tensor, scored))
    return {
        name: value + (average if name.endswith("_mean") else greatest)
        for name, value in gap.items()
    }
