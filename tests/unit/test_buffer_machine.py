"""The replay buffer under random histories, against lists that say what it must hold.

A history is any sequence of refills, early departures, deals, refusals and saves; the model keeps
every trajectory as plain numbers and works out eviction by itself.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.types import AllowedTokens, Prompt, Trajectory, TrajectoryBatch

PAD = 0
# (rollouts, longest response) of each prompt group of a refill
GROUP = st.tuples(st.integers(1, 3), st.integers(1, 4))
REFILL = st.lists(GROUP, min_size=3, max_size=7) | st.lists(GROUP, max_size=2)


def drawn(
    refill: int, groups: list[tuple[int, int]], first: int, guard: bool
) -> list[list[Trajectory]]:
    """Groups of trajectories that differ in every number, half of the prompts without answers."""
    made = []
    for place, (rollouts, longest) in enumerate(groups):
        group = first + place
        prompt = Prompt(100 + place, f"p{place}", None if place % 2 else "7")
        made.append([one(prompt, group, i, longest, refill, guard) for i in range(rollouts)])
    return made


def one(
    prompt: Prompt, group: int, sample: int, longest: int, refill: int, guard: bool
) -> Trajectory:
    length = 1 + (longest + sample) % 4
    base = group + sample / 8
    counts = torch.tensor([1 + (group + i) % 3 for i in range(length)], dtype=torch.int32)
    ids = torch.arange(int(counts.sum()), dtype=torch.int32) + group
    return Trajectory(
        prompt=prompt,
        group=group,
        prompt_ids=tuple(range(1, 2 + prompt.id % 3)),
        response_ids=tuple(range(5 + sample, 5 + sample + length)),
        response=f"r{group}.{sample}",
        truncated=sample == 1,
        formatted=sample != 1,
        correct=None if prompt.reference is None else sample == 0,
        policy_version=refill * 3,
        log_p_old=torch.arange(length) / 16 - base,
        log_p_base=torch.arange(length) / 32 - base,
        from_base=sample == 2,
        allowed=AllowedTokens(ids, counts) if guard else None,
    )


def plain(t: Trajectory) -> tuple[Any, ...]:
    """All of a trajectory as numbers and strings, tensors with their dtype."""
    allowed = t.allowed and [(x.dtype, x.tolist()) for x in (t.allowed.ids, t.allowed.counts)]
    tensors = [(x.dtype, x.tolist()) for x in (t.log_p_old, t.log_p_base)]
    rest = (t.prompt, t.group, t.prompt_ids, t.response_ids, t.response, t.truncated, t.formatted)
    return (*rest, t.correct, t.policy_version, tensors, allowed, t.from_base)


def rows(update: TrajectoryBatch) -> list[tuple[Any, ...]]:
    """An update row by row, without its padding."""
    tokens = update.tokens
    found = []
    for i in range(len(tokens.input_ids)):
        prompt, length = int(tokens.prompt_lengths[i]), int(tokens.response_lengths[i])
        allowed = None if tokens.allowed is None else tokens.allowed[i]
        assert (tokens.input_ids[i, prompt + length :] == PAD).all()
        found.append(
            (
                int(update.prompt_index[i]),
                int(update.prompt_id[i]),
                int(update.policy_version[i]),
                update.from_base is not None and bool(update.from_base[i]),
                bool(update.formatted[i]),
                tokens.input_ids[i, :prompt].tolist(),
                tokens.input_ids[i, prompt : prompt + length].tolist(),
                update.log_p_old[i, :length].tolist(),
                update.log_p_base[i, :length].tolist(),
                allowed and (allowed.ids.tolist(), allowed.counts.tolist()),
            )
        )
    return found


def expected_row(t: Trajectory) -> tuple[Any, ...]:
    return (
        t.group,
        t.prompt.id,
        t.policy_version,
        t.from_base,
        t.formatted,
        list(t.prompt_ids),
        list(t.response_ids),
        t.log_p_old.tolist(),
        t.log_p_base.tolist(),
        t.allowed and (t.allowed.ids.tolist(), t.allowed.counts.tolist()),
    )


class BufferMachine(RuleBasedStateMachine):
    """`history` is all that was added and did not part; `held` what of it must still be there."""

    @initialize(
        staleness=st.integers(0, 3),
        updates=st.sampled_from([1, 2, 3, 5]),
        per_update=st.none() | st.integers(2, 5) | st.sampled_from([1, 30]),
        seed=st.integers(0, 5),
        guard=st.booleans(),
    )
    def begin(
        self, staleness: int, updates: int, per_update: int | None, seed: int, guard: bool
    ) -> None:
        self.choices: dict[str, Any] = {
            "max_staleness": staleness,
            "updates_per_refill": updates,
            "prompts_per_update": per_update,
            "seed": seed,
        }
        self.guard = guard
        self.numbered = 0  # groups so far
        self.history: list[tuple[int, list[list[Trajectory]]]] = []
        self.buffer = ReplayBuffer(**self.choices)

    @property
    def newest(self) -> int:
        return self.history[-1][0] if self.history else -1

    @property
    def held(self) -> list[list[Trajectory]]:
        """Groups that are not too stale, oldest first."""
        oldest = self.newest - self.choices["max_staleness"]
        return [group for refill, groups in self.history if refill >= oldest for group in groups]

    @rule(groups=REFILL, ahead=st.sampled_from([1, 1, 1, 2, 4]), train=st.booleans())
    def add(self, groups: list[tuple[int, int]], ahead: int, train: bool) -> None:
        made = drawn(self.newest + ahead, groups, self.numbered, self.guard)
        self.numbered += len(groups)
        self.history.append((self.newest + ahead, made))
        self.buffer.add([t for group in made for t in group], self.newest)
        if train:
            self.deal()

    @precondition(lambda self: self.history)
    @rule(behind=st.integers(0, 3))
    def refuse_a_refill_out_of_order(self, behind: int) -> None:
        late = self.newest - behind
        (group,) = drawn(late, [(1, 1)], 1000, self.guard)
        with pytest.raises(ValueError, match=f"refill {late} after refill {self.newest}"):
            self.buffer.add(group, late)

    @precondition(lambda self: self.history)
    @rule(parted=st.integers(1, 3))
    def part_with_the_oldest(self, parted: int) -> None:
        """As `buffer.min_ess` does: refills leave before they are too stale, the newest never."""
        oldest = self.newest - self.choices["max_staleness"]
        held = [refill for refill, _ in self.history if refill >= oldest]
        gone = held[:-1][:parted]
        expected = sum(len(g) for r, groups in self.history if r in gone for g in groups)
        assert self.buffer.drop(gone) == expected
        self.history = [(r, groups) for r, groups in self.history if r not in gone]
        with pytest.raises(ValueError, match="the newest stays"):
            self.buffer.drop([*gone, self.newest])

    @rule(used=st.booleans())
    def save_and_load(self, used: bool) -> None:
        """Into a buffer of a new process, or into one that held something else."""
        file = io.BytesIO()
        torch.save(self.buffer.state_dict(), file)
        file.seek(0)
        self.buffer = ReplayBuffer(**self.choices)
        if used:
            self.buffer.add(drawn(7, [(2, 2)], 2000, self.guard)[0], 7)
        self.buffer.load_state_dict(torch.load(file, weights_only=True))

    @rule()
    def deal(self) -> None:
        groups = {group[0].group: group for group in self.held}
        updates = self.choices["updates_per_refill"]
        in_newest = len(self.history[-1][1]) if self.history else 0
        per_update = self.choices["prompts_per_update"] or in_newest // updates
        if not groups or not per_update:
            reason = "empty" if not groups else f"{in_newest} prompt groups cannot feed {updates}"
            with pytest.raises(ValueError, match=reason):
                self.buffer.updates(PAD)
            return
        dealt = [rows(update) for update in self.buffer.updates(PAD)]
        assert len(dealt) == updates
        for update in dealt:
            chosen = list(dict.fromkeys(row[0] for row in update))
            assert len(chosen) == min(per_update, len(groups))
            # whole groups, each once, with all that training needs of them
            assert update == [expected_row(t) for group in chosen for t in groups[group]]
        times = Counter(group for update in dealt for group in {row[0] for row in update})
        often = [times[group] for group in groups]
        assert max(often) - min(often) <= 1, "none again before all were used"
        on_policy = not self.choices["max_staleness"] and not self.choices["prompts_per_update"]
        if on_policy and in_newest % updates == 0:
            assert set(often) == {1}
        assert dealt == [rows(update) for update in self.never_saved().updates(PAD)]

    def never_saved(self) -> ReplayBuffer:
        """What the same history leaves in a buffer that was never dealt from nor saved."""
        twin = ReplayBuffer(**self.choices)
        for refill, groups in self.history:
            twin.add([t for group in groups for t in group], refill)
        return twin

    @invariant()
    def holds_what_the_lists_say(self) -> None:
        if not hasattr(self, "buffer"):
            return
        held = [plain(t) for group in self.held for t in group]
        assert [plain(t) for t in self.buffer] == held
        assert len(self.buffer) == len(held)
        last = self.history[-1][1] if self.history else []
        assert [plain(t) for t in self.buffer.newest] == [plain(t) for g in last for t in g]
        assert self.buffer.refill == self.newest


BufferMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
TestBuffer = BufferMachine.TestCase
