"""Whether the mean length of responses is chosen, and the price of a token that brings it about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from powerflow_lit.dual import Ascent, Dual
from powerflow_lit.mendable import MendableError
from powerflow_lit.objectives import length_fit

AT_BOUND = 3  # refills in a row after which it is said that the price stands at a bound


class LengthControlError(MendableError, ValueError):
    """A length was chosen that no price can bring about; the message names both and the remedy."""


class LengthControl:
    """No control: the length follows from the objective (`length_control=none`)."""

    is_on = False

    def price(self, prompt_id: Tensor) -> Tensor | None:
        """lambda of each trajectory's prompt, (N,) nats per token; None where there is none."""
        return None

    def observe(
        self,
        mismatch: Tensor,
        weight: Tensor,
        length: Tensor,
        prompt_index: Tensor,
        prompt_id: Tensor,
    ) -> Iterator[str]:
        """Told of each refill before it is trained on; yields what the user should be warned of.

        Args:
            mismatch: (N,) nats, residuals without log Z under the policy that sampled, at the
                prices in force.
            weight: (N,) of the loss.
            length: (N,) tokens.
            prompt_index: (N,) equal within a group.
            prompt_id: (N,) the task's id of the prompt.
        """
        yield from ()

    def metrics(self) -> dict[str, float]:
        """What to log with each update."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a checkpoint; empty where that run had no control."""


class ChosenLength(LengthControl):
    """The mean length is chosen, and the price solved for, once a refill.

    With `lead` = price in force - price that the policy has answered (`length_fit`), a refill moves
    the price by -follow * lead + rate * (mean |y| - target) / Var|y|. The second term is Newton's
    step. The first ties the price to the policy, which takes tens of refills to answer: without it
    (`follow` 0, plain dual ascent) the price runs far ahead and the length swings. So it leads by
    rate / follow Newton steps while there is a gap, and at the end both vanish: the length is the
    chosen one, and the policy has answered. The first price is the one at which the base's length
    stands still.

    Args:
        tokens: the chosen mean length; None takes `factor`.
        factor: the chosen mean length as a multiple of the first refill's, which the base sampled.
        scope: `global`: the mean over prompts is the chosen one, by one price for all; `prompt`:
            that of each prompt, by a price of its own (for small, repeating prompt sets).
        follow: share of the lead that is taken back at a refill, in [0, 1].
        rate: of Newton's step, how much is made at a refill; above 1 it pushes harder than the tilt
            alone asks for.
        max_step: largest change of a price at a refill, nats per token.
        bounds: least and largest price, nats per token.
        max_tokens: at which responses are cut.
    """

    is_on = True

    def __init__(
        self,
        *,
        tokens: float | None,
        factor: float,
        scope: Literal["global", "prompt"],
        follow: float,
        rate: float,
        max_step: float,
        bounds: Sequence[float],
        max_tokens: int,
    ) -> None:
        self.tokens, self.factor, self.scope = tokens, factor, scope
        self.follow, self.rate, self.max_step = follow, rate, max_step
        self.max_tokens = max_tokens
        low, high = bounds
        # the move is made up here, so that the state only adds and bounds it
        self._ascent = Ascent(rate=1.0, gain=0.0, smoothing=0.0, low=low, high=high)
        self._prices: Dual | None = None  # None before the first refill
        self._first = self._target = float("nan")  # tokens: the first refill's mean, the chosen
        self._lead = 0.0

    def price(self, prompt_id: Tensor) -> Tensor | None:
        prices = self._prices
        if prices is None:
            return None
        if self.scope == "global":
            return torch.full(prompt_id.shape, prices.value, device=prompt_id.device)
        own = [prices.value_of(i) for i in prompt_id.tolist()]
        return torch.tensor(own, device=prompt_id.device)

    def observe(
        self,
        mismatch: Tensor,
        weight: Tensor,
        length: Tensor,
        prompt_index: Tensor,
        prompt_id: Tensor,
    ) -> Iterator[str]:
        """
        Raises:
            LengthControlError: the chosen length is none that responses can have.
        """
        usable = (mismatch.isfinite() & weight.isfinite()).cpu()  # a NaN would stay in the price
        mismatch, weight, length, prompt_index, prompt_id = (
            x.cpu()[usable] for x in (mismatch, weight, length.double(), prompt_index, prompt_id)
        )
        if not len(length):
            return
        fit = length_fit(mismatch, weight, length, prompt_index)
        if self._prices is None:
            self._first = float(length.mean())
            self._target = self._chosen(self._first)
            yield from self._out_of_reach(length)
            start = min(max(-fit.lead, self._ascent.low), self._ascent.high)
            self._prices = Dual(self._ascent, start=start)
            mismatch = mismatch + start * length
            fit = length_fit(mismatch, weight, length, prompt_index)

        def move(rows: Tensor) -> float:
            if fit.variance == 0:
                return 0.0
            own = length_fit(mismatch[rows], weight[rows], length[rows], prompt_index[rows])
            # by the variance of all: a prompt's own, of few rollouts, would be noise to divide by
            lead = own.covariance / fit.spread
            newton = (float(length[rows].mean()) - self._target) / fit.variance
            step = self.rate * newton - self.follow * lead
            return min(max(step, -self.max_step), self.max_step)

        everyone = torch.ones_like(prompt_id, dtype=torch.bool)
        by_prompt = prompt_id.unique().tolist() if self.scope == "prompt" else []
        before = self._prices.value
        self._prices.step(move(everyone), {i: move(prompt_id == i) for i in by_prompt})
        self._lead = fit.lead + self._prices.value - before
        if self._prices.state.at_bound == AT_BOUND:
            yield (
                f"the price of length has stood at its bound {self._prices.value:g} for "
                f"{AT_BOUND} refills, with responses of {float(length.mean()):.4g} tokens against "
                f"{self._target:.4g} chosen: choose a nearer length, or wider length_control.bounds"
            )

    def _chosen(self, first: float) -> float:
        """The target in tokens; `first` is the mean length of the first refill."""
        if self.tokens is not None:
            return self.tokens
        chosen = self.factor * first
        if not 1 < chosen < self.max_tokens:
            raise LengthControlError(
                f"length_control.factor={self.factor:g} of the first refill's mean length of "
                f"{first:.4g} tokens is {chosen:.4g}: must lie between 1 and "
                f"rollout.max_new_tokens={self.max_tokens}"
            )
        return chosen

    def _out_of_reach(self, length: Tensor) -> Iterator[str]:
        least, most = float(length.min()), float(length.max())
        if not least < self._target < most:
            yield (
                f"the chosen mean length is {self._target:.4g} tokens, but the first refill's "
                f"responses have {least:g} to {most:g}: a price moves what is sampled, and may "
                "never get there"
            )

    def metrics(self) -> dict[str, float]:
        """Price (of all prompts) and its lead over the policy, nats per token; target, tokens."""
        if self._prices is None:
            return {}
        return {
            "length_price": self._prices.value,
            "length_price_lead": self._lead,
            "length_target": self._target,
        }

    def state_dict(self) -> dict[str, Any]:
        if self._prices is None:
            return {}
        prices = self._prices.state_dict()
        return {"prices": prices, "first": self._first, "lead": self._lead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self._prices = Dual(self._ascent, start=0.0)
        self._prices.load_state_dict(state["prices"])
        self._first, self._lead = state["first"], state["lead"]
        self._target = self._chosen(self._first)  # another one, if the resume was forced to it
