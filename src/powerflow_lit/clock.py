"""Wall-clock seconds by phase of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up seconds by phase: rollout, score, update, sync, eval."""

    def __init__(self) -> None:
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

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        lap, self._since = dict(self._since), defaultdict(float)
        return lap
