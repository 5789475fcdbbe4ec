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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from powerflow_lit.blocks import inner_boundaries
from powerflow_lit.objectives import LossInputs, LossOutput, group_log_z

Objective = Callable[[LossInputs], LossOutput]
Batch = Callable[[Tensor, int], LossInputs]  # (logits, step) -> what the next update is made of


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


# --- inputs --------------------------------------------------------------------------------------


def inputs_for(
    language: Language,
    logits: Tensor,
    base: Tensor,
    *,
    log_z: Tensor | float = 0.0,
    rows: Tensor | None = None,
    log_p_old: Tensor | None = None,
    psi: Tensor | float = 0.0,
    group: int | None = None,
    flow: FlowTable | None = None,
) -> LossInputs:
    """The strings `rows` (default: all, once each) as rollouts of one prompt, or as groups of
    `group` rollouts each.

    Without `log_p_old` the behaviour policy is the uniform distribution over the strings, under
    which the unclipped sequence weight is N pi(y): the mean is then an exact expectation.
    """
    rows = torch.arange(len(language)) if rows is None else rows
    log_pf = language.token_log_probs(logits)[rows]
    if log_p_old is None:  # the whole of -log N on the first token
        log_p_old = torch.zeros_like(log_pf)
        log_p_old[:, 0] = -math.log(len(language))
    return LossInputs(
        log_pf=log_pf,
        log_p_base=language.token_log_probs(base)[rows],
        log_p_old=log_p_old,
        mask=language.mask[rows],
        log_z=torch.as_tensor(log_z, dtype=torch.float64).expand(len(rows)),
        format_penalty=torch.as_tensor(psi, dtype=torch.float64).expand(len(language))[rows],
        prompt_index=torch.arange(len(rows)) // (group or len(rows)),
        log_flow=None if flow is None else flow.at_boundaries(rows),
    )


# --- where log Z comes from, as modules of the inputs --------------------------------------------


class LearnedScalar(nn.Module):
    """One trained number: what a head is when there is one prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.value.expand(len(inputs.mask))


class FlowTable(LearnedScalar):
    """log Z' and log V of every unfinished prefix, trained together: what a flow head is here."""

    def __init__(self, language: Language, block_size: int) -> None:
        super().__init__()
        self.language, self.block_size = language, block_size
        self.table = nn.Parameter(torch.zeros(len(language.last_letter), dtype=torch.float64))

    def at_boundaries(self, rows: Tensor) -> Tensor:
        """log V between the blocks of the strings `rows`, (n, K); anything where one has ended."""
        every = self.language.prefix[rows]  # (n, T)
        boundaries = inner_boundaries(every.shape[1], self.block_size)
        places = self.block_size * torch.arange(1, boundaries + 1)
        return self.table[every[:, places.clamp(max=every.shape[1] - 1)]]


class Frozen(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: LossInputs) -> Tensor:
        return torch.full((len(inputs.mask),), self.value, dtype=torch.float64)


class ClosedForm(nn.Module):
    """Minus the mean mismatch of the rollouts, from the project's own closed form."""

    def __init__(self, mismatch: Callable[[LossInputs], Tensor]) -> None:
        super().__init__()
        self.mismatch = mismatch

    def forward(self, inputs: LossInputs) -> Tensor:
        mismatch = self.mismatch(inputs)
        return group_log_z(mismatch, torch.ones_like(mismatch), inputs.prompt_index)


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Adam; both learning rates fall linearly to zero."""

    steps: int
    lr: float
    lr_z: float
    samples: int = 256  # per refill, on-policy only
    updates_per_refill: int = 1  # beyond 1 the later ones are off-policy


@dataclass(frozen=True)
class Step:
    """The policy after `number` updates, and what its next batch says."""

    number: int
    logits: Tensor  # (prefixes, V)
    log_z: float  # mean over the batch
    loss: float


def all_strings(
    language: Language,
    base: Tensor,
    psi: Tensor | float = 0.0,
    flow: FlowTable | None = None,
) -> Batch:
    """Every string once: an objective with the unclipped sequence weight then follows its exact
    on-policy gradient."""
    return lambda logits, step: inputs_for(language, logits, base, psi=psi, flow=flow)


def own_samples(
    language: Language,
    base: Tensor,
    recipe: Recipe,
    *,
    psi: Tensor | float = 0.0,
    seed: int = 0,
    group: int | None = None,
    base_share: float = 0.0,
    as_mixture: bool = False,
    flow: FlowTable | None = None,
) -> Batch:
    """Strings drawn from the current policy; all updates of a refill use the whole of it.

    Args:
        group: rollouts of a prompt; None: all are of one.
        base_share: of each group, drawn from the base.
        as_mixture: every string has the chance that the mixture of both gave it (the balance
            heuristic), not that of whichever drew it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, log_p_old = torch.tensor([]), torch.tensor([])
    size = group or recipe.samples
    of_base = round(base_share * size)

    def drawn(logits: Tensor, each: int) -> Tensor:
        """(groups, each) strings."""
        if each == 0:
            return torch.zeros(recipe.samples // size, 0, dtype=torch.long)
        chances, count = language.log_probs(logits).exp(), recipe.samples // size * each
        return torch.multinomial(chances, count, True, generator=generator).view(-1, each)

    def behaviour(old: Tensor, rows: Tensor) -> Tensor:
        """(N, T) nats."""
        by_policy = torch.arange(len(rows)) % size < size - of_base
        log_probs = [language.token_log_probs(logits)[rows] for logits in (old, base)]
        if not as_mixture:
            return torch.where(by_policy[:, None], log_probs[0], log_probs[1])
        shares = torch.tensor([1 - of_base / size, of_base / size], dtype=old.dtype).log()
        mixed = torch.zeros_like(log_probs[0])
        mixed[:, 0] = torch.logsumexp(torch.stack([x.sum(1) for x in log_probs], 1) + shares, 1)
        return mixed

    def batch(logits: Tensor, step: int) -> LossInputs:
        nonlocal rows, log_p_old
        if step % recipe.updates_per_refill == 0:
            old = logits.detach()
            rows = torch.cat([drawn(old, size - of_base), drawn(base, of_base)], 1).flatten()
            log_p_old = behaviour(old, rows)
        return inputs_for(
            language, logits, base, rows=rows, log_p_old=log_p_old, psi=psi, group=group, flow=flow
        )

    return batch


def training(
    base: Tensor, objective: Objective, log_z: nn.Module, recipe: Recipe, batch: Batch
) -> Iterator[Step]:
    """Adam from the base: a `Step` before every update and one after the last."""
    logits = base.clone().requires_grad_()
    groups = [{"params": [logits], "lr": recipe.lr}]
    if of_z := list(log_z.parameters()):
        groups.append({"params": of_z, "lr": recipe.lr_z})
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 - k / recipe.steps)
    for number in range(recipe.steps + 1):
        inputs = with_log_z(batch(logits, number), log_z)
        loss = objective(inputs).loss
        mean_z = float(inputs.log_z.detach().mean())
        yield Step(number, logits.detach().clone(), mean_z, float(loss.detach()))
        if number < recipe.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()


def with_log_z(inputs: LossInputs, log_z: nn.Module) -> LossInputs:
    return replace(inputs, log_z=log_z(inputs))
