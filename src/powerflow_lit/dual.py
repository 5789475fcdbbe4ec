"""Dual ascent: a multiplier that a measured gap drives until the gap is gone, one or one a prompt.

The policy follows a multiplier only over tens of refills. One that merely sums the gaps up would
have gone far past its place by then, so a share of the present gap counts at once beside the sum (a
proportional term, as in PID Lagrangian methods, Stooke et al., arXiv 2007.03964): it pushes while
the gap is there, and is gone with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ascent:
    """How a multiplier answers a gap; in its own unit (such as log alpha) for a gap of 1.

    Attributes:
        rate: of each refill's gap, added to the sum for good.
        gain: of the present gap, beside the sum.
        smoothing: share of the old gap in the present one, in [0, 1).
        low, high: bounds of the multiplier; -inf and inf for none.
        largest: what a smoothed gap counts at most, either way; inf for all of it.
    """

    rate: float
    gain: float
    smoothing: float
    low: float
    high: float
    largest: float = math.inf

    def step(self, state: State, gap: float) -> State:
        """The state after a refill with this gap; a positive one raises the multiplier.

        Past a bound nothing is summed up that would have to be taken back later.
        """
        if state.gap is not None:
            gap = self.smoothing * state.gap + (1 - self.smoothing) * gap
        total, now = state.total + self.rate * self._cut(gap), self.gain * self._cut(gap)
        if gap > 0 and total + now > self.high:
            total = max(state.total, min(total, self.high - now))
        elif gap < 0 and total + now < self.low:
            total = min(state.total, max(total, self.low - now))
        stands = (self.value(State(total, gap)) == self.high and gap > 0) or (
            self.value(State(total, gap)) == self.low and gap < 0
        )
        return State(total, gap, state.at_bound + 1 if stands else 0)

    def value(self, state: State) -> float:
        """The multiplier, within its bounds."""
        now = 0.0 if state.gap is None else self.gain * self._cut(state.gap)
        return min(max(state.total + now, self.low), self.high)

    def _cut(self, gap: float) -> float:
        return min(max(gap, -self.largest), self.largest)


@dataclass(frozen=True)
class State:
    """Where a multiplier stands."""

    total: float  # its start, and the gaps summed up since
    gap: float | None = None  # smoothed; None before the first
    at_bound: int = 0  # refills in a row that ended at a bound with a gap that pushes past it


class Dual:
    """A multiplier for all prompts, and one for each prompt that was stepped by itself.

    Args:
        start: its value before the first step, within the bounds.
    """

    def __init__(self, ascent: Ascent, *, start: float) -> None:
        self.ascent = ascent
        self.state = State(start)
        self.of_prompt: dict[int, State] = {}

    @property
    def value(self) -> float:
        """The multiplier for all prompts."""
        return self.ascent.value(self.state)

    def value_of(self, prompt_id: int) -> float:
        """A prompt's own; one that was never stepped takes that of all."""
        return self.ascent.value(self.of_prompt.get(prompt_id, self.state))

    @property
    def values(self) -> list[float]:
        """Those of all prompts that were stepped by themselves."""
        return [self.ascent.value(state) for state in self.of_prompt.values()]

    def step(self, gap: float, gaps: Mapping[int, float] | None = None) -> None:
        """The end of a refill.

        Args:
            gap: of the whole refill.
            gaps: of its prompts by id, where each has its own; a prompt's first step begins where
                that of all stood.
        """
        before = self.state
        self.state = self.ascent.step(before, gap)
        for prompt, own in (gaps or {}).items():
            start = State(before.total, before.gap)
            self.of_prompt[prompt] = self.ascent.step(self.of_prompt.get(prompt, start), own)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "all": _plain(self.state),
            "ids": list(self.of_prompt),
            "states": [_plain(state) for state in self.of_prompt.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = State(*state["all"])
        self.of_prompt = {
            i: State(*one) for i, one in zip(state["ids"], state["states"], strict=True)
        }


def _plain(state: State) -> list[Any]:
    return [state.total, state.gap, state.at_bound]
