"""alpha by a target (`alpha_schedule=target_entropy | target_kl`) instead of by hand.

alpha is the multiplier of a constraint on the policy. After each refill log alpha moves by how far
the refill's own rollouts are from the target (dual ascent, `docs/auto_alpha.md`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from powerflow_lit.dual import Ascent, Dual
from powerflow_lit.fresh import FreshRollouts, Sums

Scope = Literal["global", "prompt"]
Per = Literal["token", "response"]


class Target(Protocol):
    """What the policy is held to."""

    def measure(self, sums: Sums) -> float:
        """What the target is on, of some rollouts."""

    def level(self, first: Sums) -> float:
        """Where it is to be, given the rollouts of the first refill, which are the base's."""

    def sign(self, start: float) -> int:
        """1 where a greater alpha raises the measure, else -1, for an alpha that begins there."""

    def bounds(self, start: float, low: float, high: float) -> tuple[float, float]:
        """Bounds of alpha, within those that are given."""

    def said(self, level: float) -> str:
        """The target as the user has set it."""


@dataclass(frozen=True, kw_only=True)
class EntropyRatio:
    """Entropy per token at `ratio` of the base's: below 1 sharpens, above 1 flattens.

    The entropy of a refill is -sum log pi(y) / sum |y| over its rollouts, nats per token. With
    scope=prompt all prompts aim at one level: the base's own is not known of a later prompt.
    """

    ratio: float

    def measure(self, sums: Sums) -> float:
        return sums.surprise / sums.tokens

    def level(self, first: Sums) -> float:
        return self.ratio * self.measure(first)

    def sign(self, start: float) -> int:
        return -1

    def bounds(self, start: float, low: float, high: float) -> tuple[float, float]:
        return low, high

    def said(self, level: float) -> str:
        return f"alpha_schedule.target.ratio={self.ratio:g} ({level:.4g} nats a token)"


@dataclass(frozen=True, kw_only=True)
class KlBudget:
    """KL(pi || p_base) at `budget` nats, on the side of 1 on which alpha begins; it never crosses.

    Estimated as sum (log pi(y) - log p_base(y)) over a refill's rollouts, divided by their tokens
    (`per=token`, as `train/kl_base`) or by their number (`per=response`).
    """

    budget: float
    per: Per

    def measure(self, sums: Sums) -> float:
        return sums.divergence / (sums.tokens if self.per == "token" else sums.responses)

    def level(self, first: Sums) -> float:
        return self.budget

    def sign(self, start: float) -> int:
        return 1 if start > 1 else -1

    def bounds(self, start: float, low: float, high: float) -> tuple[float, float]:
        return (max(low, 1.0), high) if start > 1 else (low, min(high, 1.0))

    def said(self, level: float) -> str:
        return f"alpha_schedule.target.budget={self.budget:g} (nats a {self.per})"


class AutomaticAlpha:
    """A schedule whose alpha is where the target has driven it.

    Args:
        target: what the policy is held to.
        start: alpha of the first refill.
        rate, gain, smoothing: of log alpha by the relative gap, see `dual.Ascent`.
        largest_gap: what a smoothed relative gap counts at most, either way.
        alpha_min, alpha_max: bounds of alpha.
        scope: `global`, or `prompt`: each prompt aims at the target by itself (for small, repeating
            prompt sets); one that no refill has held yet takes the alpha of all.
        patience: refills in a row at a bound after which the target counts as out of reach.

    Attributes:
        reached: the measure of the last refill's rollouts, in nats; None before there was one.
        gap: how far it is from its level, relative to it; positive where it is too low.
    """

    def __init__(
        self,
        *,
        target: Target,
        start: float,
        rate: float,
        gain: float,
        smoothing: float,
        largest_gap: float,
        alpha_min: float,
        alpha_max: float,
        scope: Scope,
        patience: int,
    ) -> None:
        self._asked = alpha_min, alpha_max
        low, high = target.bounds(start, alpha_min, alpha_max)
        self.dual = Dual(
            Ascent(rate, gain, smoothing, math.log(low), math.log(high), largest_gap),
            start=math.log(start),
        )
        self.target, self.scope, self.patience = target, scope, patience
        self.sign = target.sign(start)
        self.first: Sums | None = None  # of the first refill
        self.reached: float | None = None
        self.gap: float | None = None

    def __call__(self, alpha: float, progress: float) -> float:
        """alpha now, the median where prompts have their own; as of a schedule by progress."""
        own = self.dual.values
        return math.exp(median(own) if own else self.dual.value)

    def of_prompts(self, prompt_id: Tensor) -> Tensor | None:
        """alpha of each trajectory's prompt, (N,); None where all share one."""
        if self.scope == "global":
            return None
        alphas = [math.exp(self.dual.value_of(i)) for i in prompt_id.tolist()]
        return torch.tensor(alphas, device=prompt_id.device)

    def step(self, rollouts: FreshRollouts) -> bool:
        """The end of a refill; nothing changes, and it says so, where none was fresh."""
        whole = rollouts.whole
        if whole.tokens == 0:
            return False
        self.first = self.first or whole
        level = self.target.level(self.first)
        self.reached = self.target.measure(whole)
        self.gap = 1 - self.reached / level
        own = None
        if self.scope == "prompt":
            own = {
                prompt: self._push(1 - self.target.measure(sums) / level)
                for prompt, sums in rollouts.of_prompt.items()
            }
        self.dual.step(self._push(self.gap), own)
        return True

    def _push(self, gap: float) -> float:
        """A refill's gap as the multiplier takes it: 1 at most, as where nothing is reached yet,
        so that one strange rollout does not count for many refills."""
        return self.sign * min(max(gap, -1.0), 1.0)

    @property
    def out_of_reach(self) -> str | None:
        """Why the target cannot be reached as things are set, in a line; None where it may be."""
        if self.dual.state.at_bound < self.patience or self.first is None:
            return None
        alpha, at_top = math.exp(self.dual.value), self.dual.value >= self.dual.ascent.high
        key, own = ("alpha_max", self._asked[1]) if at_top else ("alpha_min", self._asked[0])
        remedy = f"or alpha_schedule.{key} further out"
        if not math.isclose(alpha, own):  # the target's bound, not the user's
            remedy = "and one that alpha=1 does not overshoot: there only psi moves the policy"
        return (
            f"{self.target.said(self.target.level(self.first))}: the rollouts are at "
            f"{self.reached:.4g}, and alpha has stood at its bound {alpha:.4g} for "
            f"{self.dual.state.at_bound} refills: the target is out of reach unless the policy is "
            f"still on its way; set another, more refills, {remedy}"
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Without prefix: what the last refill has reached, its gap, and alpha over prompts."""
        found: dict[str, float] = {}
        if self.reached is not None and self.gap is not None:
            found = {"alpha_reached": self.reached, "alpha_gap": self.gap}
        if values := self.dual.values:
            alphas = torch.tensor(values, dtype=torch.float64).exp()
            found["alpha_prompt_mean"] = float(alphas.mean())
            for share in (0.05, 0.5, 0.95):
                found[f"alpha_prompt_q{100 * share:02.0f}"] = float(alphas.quantile(share))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "dual": self.dual.state_dict(),
            "first": None if self.first is None else list(astuple(self.first)),
            "reached": self.reached,
            "gap": self.gap,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dual.load_state_dict(state["dual"])
        self.first = None if state["first"] is None else Sums(*state["first"])
        self.reached, self.gap = state["reached"], state["gap"]
