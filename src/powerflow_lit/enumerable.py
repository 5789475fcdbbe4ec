"""A language small enough to enumerate, where every target is known exactly.

Two letters and an end symbol; a response ends with the end symbol or is cut at the cap, and the
cut responses count as outcomes of their own: 127 strings of 1 to 6 tokens. Policies are tables of
logits, one row per unfinished prefix, so any distribution over the strings is reachable.

The targets come from enumeration and root finding in float64, never from the objectives, so that
tests and `experiments/exactness` can hold the objectives against them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Language:
    """Every string, as a table that turns prefix logits into token log-probs."""

    symbols: int  # letters and the end symbol, which is the last
    token: Tensor  # (N, T) long  padded with the end symbol
    prefix: Tensor  # (N, T) long  row of the logits table that yields the token
    mask: Tensor  # (N, T) bool
    last_letter: Tensor  # (prefixes,) long  `symbols - 1` at the start of a string

    @classmethod
    def build(cls, letters: int = 2, cap: int = 6) -> Language:
        end = letters
        prefixes = [p for k in range(cap) for p in itertools.product(range(letters), repeat=k)]
        row_of = {p: i for i, p in enumerate(prefixes)}
        finished = [(*p, end) for p in prefixes]
        cut = list(itertools.product(range(letters), repeat=cap))
        strings = finished + cut
        pad = [[t < len(y) for t in range(cap)] for y in strings]
        return cls(
            symbols=letters + 1,
            token=torch.tensor([[*y, *[end] * (cap - len(y))] for y in strings]),
            prefix=torch.tensor(
                [[row_of[y[:t]] if t < len(y) else 0 for t in range(cap)] for y in strings]
            ),
            mask=torch.tensor(pad),
            last_letter=torch.tensor([p[-1] if p else end for p in prefixes]),
        )

    def __len__(self) -> int:
        return self.token.shape[0]

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1).double()  # (N,) tokens, end symbol included

    def token_log_probs(self, logits: Tensor) -> Tensor:
        """(prefixes, V) -> (N, T) nats, 0 on padding."""
        table = logits.log_softmax(-1)
        return torch.where(self.mask, table[self.prefix, self.token], 0.0)

    def log_probs(self, logits: Tensor) -> Tensor:
        """log p(y) of every string, (N,)."""
        return self.token_log_probs(logits).sum(1)

    def logits_of(self, log_p: Tensor) -> Tensor:
        """The policy whose strings have exactly these log-probs, (N,) -> (prefixes, V)."""
        mass = torch.zeros(len(self.last_letter), self.symbols, dtype=torch.float64)
        rows, columns = self.prefix[self.mask], self.token[self.mask]
        per_token = log_p.exp()[:, None].expand(self.mask.shape)[self.mask]
        return mass.index_put((rows, columns), per_token, accumulate=True).log()

    def lacks(self, letter: int) -> Tensor:
        """(N,) bool: the string never uses the letter; a stand-in for a format rule."""
        return ~((self.token == letter) & self.mask).any(1)

    # --- bases ---

    def bigram_base(self, seed: int, spread: float = 1.0) -> Tensor:
        """Logits that depend on the previous letter only, (prefixes, V)."""
        table = torch.randn(
            self.symbols,
            self.symbols,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        return (spread * table)[self.last_letter]

    def memoryless_base(self, probabilities: list[float]) -> Tensor:
        """The same symbol distribution whatever came before, (prefixes, V)."""
        row = torch.tensor(probabilities, dtype=torch.float64).log()
        return row.expand(len(self.last_letter), -1)

    # --- targets: normalised log-probs of every string, (N,), with their constants in nats ---

    def power_target(
        self, base: Tensor, alpha: float, psi: Tensor | float = 0.0
    ) -> tuple[Tensor, float]:
        """p^alpha exp(alpha L psi) / Z, and log Z."""
        energy = alpha * (self.log_probs(base) + self.lengths * psi)
        log_z = energy.logsumexp(0)
        return energy - log_z, float(log_z)

    def length_averaged_target(
        self, base: Tensor, alpha: float, psi: Tensor | float = 0.0
    ) -> tuple[Tensor, float]:
        """p^alpha exp(alpha L psi) Z'^-L, and the log Z' at which it sums to one."""
        energy = alpha * (self.log_probs(base) + self.lengths * psi)
        reach = max(64.0, 8 * alpha)  # log Z' is about alpha times a token's log-prob
        log_z = root(lambda x: float((energy - x * self.lengths).logsumexp(0)), reach)
        return energy - log_z * self.lengths, log_z

    def chosen_length_target(
        self, base: Tensor, alpha: float, length: float, psi: Tensor | float = 0.0
    ) -> tuple[Tensor, float]:
        """p^alpha exp(alpha L psi - lambda L) / Z of mean length `length` (tokens), and lambda."""
        energy = alpha * (self.log_probs(base) + self.lengths * psi)

        def at(price: float) -> Tensor:
            return (energy - price * self.lengths).log_softmax(0)

        price = root(lambda x: float((at(x).exp() * self.lengths).sum()) - length)
        return at(price), price

    def token_target(
        self, base: Tensor, strength: float, psi: Tensor | float = 0.0
    ) -> tuple[Tensor, float]:
        """p exp(strength (b + psi)) / Z with b = log p / L, and log Z."""
        B = self.log_probs(base)
        energy = B + strength * (B / self.lengths + psi)
        log_z = energy.logsumexp(0)
        return energy - log_z, float(log_z)

    def averaged_power_target(self, base: Tensor, alpha: float) -> tuple[Tensor, float]:
        """exp(alpha b) / Z with b = log p / L, and log Z: the `power` reading of TB-token."""
        energy = alpha * self.log_probs(base) / self.lengths
        log_z = energy.logsumexp(0)
        return energy - log_z, float(log_z)

    def frozen_zero_target(self, base: Tensor, alpha: float) -> Tensor:
        """p^alpha exp(c L^2), with the c at which it sums to one."""
        energy, square = alpha * self.log_probs(base), self.lengths**2
        c = -root(lambda x: float((energy - x * square).logsumexp(0)))
        return energy + c * square

    # --- prefixes ---

    @property
    def prefix_lengths(self) -> Tensor:
        """(prefixes,) tokens of each unfinished prefix."""
        places = torch.arange(self.mask.shape[1]).expand(self.mask.shape)
        found = torch.zeros(len(self.last_letter), dtype=torch.long)
        return found.index_put((self.prefix[self.mask],), places[self.mask]).double()

    def prefix_log_probs(self, logits: Tensor) -> Tensor:
        """log p(x) of every unfinished prefix x, (prefixes,): the sum over its own tokens."""
        token = self.token_log_probs(logits)
        before = token.cumsum(1) - token  # (N, T) of the prefix that yields each token
        found = token.new_zeros(len(self.last_letter))
        return found.index_put((self.prefix[self.mask],), before[self.mask])

    def prefix_flow(self, base: Tensor, alpha: float, psi: Tensor | float = 0.0) -> Tensor:
        """log V of every unfinished prefix at the LA-TB target, (prefixes,) nats: the sum over the
        strings that begin with it of p(rest)^alpha Z'^-|rest| exp(alpha L psi)."""
        log_p, log_z = self.length_averaged_target(base, alpha, psi)
        begin = torch.zeros(len(self), len(self.last_letter), dtype=torch.bool)
        begin[torch.arange(len(self))[:, None].expand_as(self.mask)[self.mask],
              self.prefix[self.mask]] = True  # fmt: skip
        rest = log_p[:, None] - alpha * self.prefix_log_probs(base) + log_z * self.prefix_lengths
        return torch.where(begin, rest, -math.inf).logsumexp(0)


def root(decreasing: Callable[[float], float], reach: float = 64.0) -> float:
    """Zero of a decreasing function by bisection, to the last bit.

    Raises:
        ValueError: no zero within [-reach, reach].
    """
    low, high = -reach, reach
    if not decreasing(low) > 0 > decreasing(high):
        raise ValueError(f"no zero within {reach:g} of 0: pass a greater reach")
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)


def total_variation(log_p: Tensor, log_q: Tensor) -> float:
    return 0.5 * float((log_p.detach().exp() - log_q.detach().exp()).abs().sum())


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats."""
    return float((log_p.exp() * (log_p - log_q)).sum())


def exact_inversion_rate(log_p: Tensor, x: Tensor, y: Tensor, tie: float = 1e-9) -> float:
    """P[(x_i - x_j)(y_i - y_j) < 0] of strings i, j drawn from p, by enumeration of all pairs."""
    p = log_p.exp()
    below = x[:, None] < x - tie  # (N, N); each pair counts in one of its two orders
    inverted = below & (y[:, None] > y + tie)
    return float(2 * (p @ inverted.to(p.dtype) @ p))
