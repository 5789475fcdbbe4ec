"""What of a run's configuration its memory and its time depend on, as one device sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from powerflow_lit.models.lora import LoraSettings
from powerflow_lit.models.packing import COPY_SHARE


@dataclass(frozen=True)
class EngineNeeds:
    """A rollout engine's own needs."""

    name: str  # vllm | hf | vllm server
    dtype: str
    sequences: int  # decoded at once
    kv_cache_bytes: int | None  # set aside in plain memory; None: it grows with the responses
    share_bytes: int | None  # of a GPU, everything included
    sleeps: bool  # its share is the trainer's while updates are made
    tensor_parallel: int  # t, devices that share one engine
    engines: int | None = None  # on devices of their own; None: with the trainer, one for t ranks


@dataclass(frozen=True)
class Spread:
    """How a run lies on its devices."""

    devices: int  # D, the trainer's
    per_machine: int  # of them in one machine
    shards: int  # S, devices among which each weight is divided; 1: each has all of it
    bucketed: bool  # gradients are copied into buckets before they are sent (DDP)

    @property
    def in_one_machine(self) -> bool:
        return self.devices <= self.per_machine


ONE_DEVICE = Spread(devices=1, per_machine=1, shards=1, bucketed=False)


@dataclass(frozen=True)
class Pass:
    """One forward pass over some rows, all of the greatest length."""

    tokens: int  # M, padding included where rows are padded
    predictors: int  # R, response tokens
    copies: int  # prompt tokens whose keys and values responses hold copies of
    attended: int  # pairs of query and key that the attention kernel is given


@dataclass(frozen=True)
class Workload:
    """Lengths are the greatest that are allowed; groups are those of one device."""

    dtype: str
    base_dtype: str | None  # of the second copy; None: there is none
    lora: LoraSettings | None
    autocast: bool  # bf16-mixed: weights and products in bfloat16 beside the float32 ones
    gradient_checkpointing: bool
    packing: bool
    tokens_per_microbatch: int  # B
    longest_prompt: int  # p, tokens
    longest_response: int  # L, tokens
    groups_per_refill: int  # prompts of one device
    groups_per_update: int
    samples_per_prompt: int  # n
    updates_per_refill: int
    scorings: int  # passes over a refill before it is trained on: base, and policy if needed
    logit_chunk_mb: float  # MB of float32 logits at a time
    head_width: int | None  # of the Z' head
    engine: EngineNeeds
    spread: Spread = ONE_DEVICE

    @property
    def longest_row(self) -> int:
        return self.longest_prompt + self.longest_response

    @property
    def largest_pass(self) -> Pass:
        """The rows of an update's microbatch, as `models.packing` and `forward_pass` cut them."""
        return self.passed(min(self.rows_per_pass, self.rows_per_update))

    @property
    def largest_scoring(self) -> Pass:
        """The same of a refill that is scored."""
        return self.passed(min(self.rows_per_pass, self.rows_per_refill))

    @property
    def rows_per_update(self) -> int:
        return self.groups_per_update * self.samples_per_prompt

    @property
    def rows_per_refill(self) -> int:
        return self.groups_per_refill * self.samples_per_prompt

    @property
    def passes_per_update(self) -> int:
        return self.passes(self.groups_per_update)

    def passes(self, groups: int) -> int:
        """Microbatches of so many prompt groups, which are torn only where one is too large."""
        n, rows = self.samples_per_prompt, self.rows_per_pass
        if self.packing and rows < n:
            return groups * math.ceil(n / rows)
        return math.ceil(groups * n / rows)

    @property
    def rows_per_pass(self) -> int:
        """Rows that the budget holds; one at least, whatever the budget."""
        p, L, n, budget = (
            self.longest_prompt,
            self.longest_response,
            self.samples_per_prompt,
            self.tokens_per_microbatch,
        )
        if not self.packing:
            return max(budget // (p + L), 1)
        row = L - 1 + int(COPY_SHARE * p)
        groups = budget // (p + n * row)
        return groups * n or max((budget - p) // row, 1)

    def passed(self, rows: int) -> Pass:
        """What a pass over so many rows holds."""
        p, L, n = self.longest_prompt, self.longest_response, self.samples_per_prompt
        if not self.packing:
            return Pass(rows * (p + L), rows * L, 0, rows * (p + L) ** 2)
        prompts, own = math.ceil(rows / n), rows * (L - 1)
        attended = prompts * p * p + own * (p + L - 1)
        return Pass(prompts * p + own, rows * L, rows * p, attended)
