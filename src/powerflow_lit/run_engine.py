"""A run's engine: built when first asked for, and given the policy's weights or the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from powerflow_lit import ranks
from powerflow_lit.clock import PhaseClock
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.module import PowerFlowModule
from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.rollout.rebuilding import RebuildingEngine
from powerflow_lit.trajectories import BASE_VERSION

EngineFactory = Callable[[PowerFlowModule], RolloutEngine]


class RunEngine:
    """Holds the engine and knows which weights it should have.

    Args:
        build: the engine, still without weights.
        module: the run's, once Lightning has it.
        settle: waits until nobody else uses the engine.
        clock: of starts, syncs and such waiting.
        on_rebuild: told in a line why the engine was built anew.

    Attributes:
        is_new: nothing that it decoded was compared yet.
        rebuilds: how often it was built anew, resumes included.
    """

    def __init__(
        self,
        build: EngineFactory,
        *,
        module: Callable[[], PowerFlowModule],
        settle: Callable[[], None],
        clock: PhaseClock,
        on_rebuild: Callable[[str], None],
    ) -> None:
        self._build, self._module, self._clock = build, module, clock
        self._settle, self._on_rebuild = settle, on_rebuild
        self._engine: RebuildingEngine | None = None
        self._is_base = False
        self.is_new, self.rebuilds = True, 0

    @property
    def is_built(self) -> bool:
        return self._engine is not None

    def get(self) -> RebuildingEngine:
        """The engine, as soon as nobody else uses it; built first where there is none."""
        with self._clock("rollout"):
            self._settle()
        if self._engine is None:
            with self._clock("start"):  # of the engine; one that is built anew counts as rollout
                self._engine = RebuildingEngine(
                    lambda: self._build(self._module()),
                    policy=self._weights,
                    on_rebuild=self._rebuilt,
                    may_rebuild=ranks.world_size() == 1,
                )
        return self._engine

    def sync(self, *, always: bool = False) -> None:
        """Give it the weights that it should have, unless it says that it has them."""
        weights, version = self._weights()
        if always or self.get().policy_version != version:
            with self._clock("sync"):
                self.get().sync(weights, version)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within, it has the base's weights, also if it is built anew; the next sync ends that."""
        self._is_base = True
        try:
            # always: after a resume it has not those of before the first update, which are the
            # base's but for rounding (model.base_dtype)
            self.sync(always=True)
            yield
        finally:
            self._is_base = False

    def rest(self) -> None:
        """Let it give memory back; the next sync takes it again."""
        if self._engine is not None:
            self._engine.rest()

    def close(self) -> None:
        """Free it; safe to call twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _weights(self) -> tuple[Mapping[str, Tensor], int]:
        module = self._module()
        if self._is_base:
            return module.frozen.weights(), BASE_VERSION
        return policy_weights(module.policy), module.global_step

    def _rebuilt(self, why: str) -> None:
        self.rebuilds += 1
        self.is_new = True
        self._on_rebuild(why)
