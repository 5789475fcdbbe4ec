"""Wall-clock seconds by phase of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PhaseClock:
    """Adds up seconds by phase (start, rollout, score, update, sync, eval), over resumes."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), 0.0
        self.total: dict[str, float] = defaultdict(float)
        self._since: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: str, seconds: float) -> None:
        self.total[phase] += seconds
        self._since[phase] += seconds

    @property
    def wall(self) -> float:
        """Seconds in all, those before a resume included."""
        return self._before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"total": dict(self.total), "wall": self.wall}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state["wall"]
        for phase, seconds in state["total"].items():
            self.total[phase] += seconds

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        lap, self._since = dict(self._since), defaultdict(float)
        return lap
