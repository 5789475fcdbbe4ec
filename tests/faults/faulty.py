"""Parts of a run that go wrong on purpose, for `_target_=tests.faults.faulty...`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from powerflow_lit import ranks
from powerflow_lit.objectives import BalanceObjective, LossInputs, LossOutput
from powerflow_lit.rollout import EngineError
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.rollout.vllm_engine import VllmEngine
from powerflow_lit.types import Completion


@dataclass(frozen=True)
class NanObjective(BalanceObjective):
    """Its loss is NaN in the updates `first` to `last`, counted from 1."""

    first: int = 0
    last: int = 0
    updates: list[None] = field(default_factory=list)

    def __call__(self, inputs: LossInputs, *, alpha: float, **calibration: float) -> LossOutput:
        output = super().__call__(inputs, alpha=alpha, **calibration)
        if not torch.is_grad_enabled():  # a self-check, no update
            return output
        self.updates.append(None)
        ill = self.first <= len(self.updates) <= self.last
        return replace(output, loss=output.loss * float("nan")) if ill else output


class StaleEngine(HfEngine):
    """Takes the first weights and no others."""

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        if self.policy_version < 0:
            super().sync(weights, policy_version)


class OtherEngine(HfEngine):
    """Samples from a policy that is a little sharper than the one it was given."""

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        sharper = {k: v * (1.05 if "lm_head" in k else 1.0) for k, v in weights.items()}
        super().sync(sharper, policy_version)


class OtherEngineOnRankOne(HfEngine):
    """The same on one rank alone."""

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        super().sync(weights, policy_version)
        with torch.no_grad():  # its own, since the policy's may be parts of all ranks'
            self._model.get_output_embeddings().weight.mul_(1.0 + 0.05 * ranks.rank())


class CorruptingEngine(HfEngine):
    """A bit of the policy's memory flips before the second sync: its weights hold a NaN then."""

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        if self.policy_version >= 0:
            with torch.no_grad():
                weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        super().sync(weights, policy_version)


class PoisonedVllmEngine(VllmEngine):
    """NaN gets past the check of its weights once, before the third time that it generates.

    The first engine of the process only: those built after it are sound. What it was given before
    it is then given again, as a good sync after the bad one.
    """

    generations: ClassVar[int] = 0
    nan_returned: ClassVar[int] = 0

    def generate(self, prompts: Any, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        cls = PoisonedVllmEngine
        cls.generations += 1
        if cls.generations == 3:
            self._sync_past_the_check(float("nan"))
            bad = super().generate(prompts, *args, **kwargs)
            cls.nan_returned += _not_finite(bad)
            self._sync_past_the_check(1.0)
        found = super().generate(prompts, *args, **kwargs)
        if cls.generations == 3:
            print(f"NaN while poisoned {cls.nan_returned}, after a good sync {_not_finite(found)}")
        return found

    def _sync_past_the_check(self, factor: float) -> None:
        """As `sync` does it: the policy's weights times the factor, in place."""
        weights = {name: t.detach() * factor for name, t in self._policy.state_dict().items()}
        self._engine.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(weights.items())}
        )
        self._llm.reset_prefix_cache()


def _not_finite(groups: Sequence[Sequence[Completion]]) -> int:
    found = [torch.tensor(c.log_probs) for group in groups for c in group]
    return sum(not bool(x.isfinite().all()) for x in found)


class FailingEngine(HfEngine):
    """Falls over as it samples for the second time: in the thread, where a run samples ahead."""

    generations: ClassVar[int] = 0

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        FailingEngine.generations += 1
        if FailingEngine.generations == 2:
            raise EngineError(f"fell over in thread '{threading.current_thread().name}'")
        return super().generate(*args, **kwargs)


class NanOnceEngine(HfEngine):
    """Its log-probs are NaN as it samples for the second time, whichever engine of the process."""

    generations: ClassVar[int] = 0

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        NanOnceEngine.generations += 1
        groups = super().generate(*args, **kwargs)
        if NanOnceEngine.generations != 2:
            return groups
        return [
            [replace(c, log_probs=(float("nan"),) * len(c.log_probs)) for c in g] for g in groups
        ]
