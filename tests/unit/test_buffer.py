"""The replay buffer: whole groups, bounded staleness, a state that survives a checkpoint."""

from __future__ import annotations

import io

import pytest
import torch

from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.types import Prompt, Trajectory


def trajectories(refill: int, prompts: int = 4, samples: int = 3) -> list[Trajectory]:
    made = []
    for prompt in range(prompts):
        for sample in range(samples):
            length = 1 + (prompt + sample) % 4
            made.append(
                Trajectory(
                    prompt=Prompt(prompt, f"p{prompt}", "7"),
                    group=refill * prompts + prompt,
                    prompt_ids=(1, 2, 3),
                    response_ids=tuple(range(5, 5 + length)),
                    response="r",
                    truncated=False,
                    formatted=sample % 2 == 0,
                    correct=None,
                    policy_version=refill * 2,
                    log_p_old=torch.full((length,), -0.5),
                    log_p_base=torch.full((length,), -0.7),
                )
            )
    return made


def buffer(
    staleness: int = 0, updates: int = 2, prompts_per_update: int | None = None
) -> ReplayBuffer:
    return ReplayBuffer(
        max_staleness=staleness,
        updates_per_refill=updates,
        prompts_per_update=prompts_per_update,
        seed=0,
    )


def test_a_refill_is_dealt_out_exactly_once_in_whole_groups() -> None:
    held = buffer()
    held.add(trajectories(0), 0)
    updates = held.updates(pad_id=0)
    assert len(updates) == 2
    seen = torch.cat([u.prompt_index for u in updates])
    assert sorted(seen.tolist()) == sorted(t.group for t in trajectories(0))
    for update in updates:
        _, counts = update.prompt_index.unique(return_counts=True)
        assert counts.tolist() == [3, 3]


def test_trajectories_leave_when_they_are_too_stale() -> None:
    held = buffer(staleness=1)
    for refill in range(4):
        held.add(trajectories(refill), refill)
    assert {t.policy_version for t in held} == {4, 6}
    assert {t.policy_version for t in held.newest} == {6}


def test_a_refill_may_leave_early_but_not_the_newest() -> None:
    held = buffer(staleness=3)
    for refill in range(3):
        held.add(trajectories(refill), refill)
    assert held.drop([0, 1]) == 2 * len(trajectories(0))
    assert list(held.refills) == [2]
    assert {t.policy_version for t in held} == {4}
    for refills in ([2], [0]):
        with pytest.raises(ValueError, match=rf"refills \{refills} cannot be dropped: held are"):
            held.drop(refills)


def test_a_stale_buffer_is_sampled_from_all_its_refills() -> None:
    held = buffer(staleness=3, updates=8, prompts_per_update=2)
    for refill in range(4):
        held.add(trajectories(refill), refill)
    versions = torch.cat([u.policy_version for u in held.updates(pad_id=0)]).unique()
    assert versions.tolist() == [0, 2, 4, 6]


def test_an_update_never_holds_a_group_twice() -> None:
    held = buffer(staleness=1, updates=4, prompts_per_update=3)
    for refill in range(2):
        held.add(trajectories(refill), refill)
        for update in held.updates(pad_id=0):
            _, counts = update.prompt_index.unique(return_counts=True)
            assert counts.tolist() == [3, 3, 3]
        seen = torch.cat([u.prompt_index for u in held.updates(pad_id=0)]).unique()
        assert len(seen) == 4 * (refill + 1), "twelve places hold every group at least once"


def test_the_order_is_a_function_of_seed_and_refill() -> None:
    def order(seed: int) -> list[int]:
        held = ReplayBuffer(
            max_staleness=0, updates_per_refill=1, prompts_per_update=None, seed=seed
        )
        held.add(trajectories(0, prompts=16), 0)
        return held.updates(pad_id=0)[0].prompt_index.tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_the_state_loads_without_unpickling_code_and_gives_the_same_updates() -> None:
    held = buffer(staleness=1)
    held.add(trajectories(0), 0)
    held.add(trajectories(1), 1)
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    restored = buffer(staleness=1)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert len(restored) == len(held)
    for one, other in zip(held.updates(0), restored.updates(0), strict=True):
        assert torch.equal(one.tokens.input_ids, other.tokens.input_ids)
        assert torch.equal(one.log_p_base, other.log_p_base)
        assert torch.equal(one.formatted, other.formatted)


def test_refills_come_in_order_and_an_empty_buffer_deals_nothing() -> None:
    held = buffer()
    with pytest.raises(ValueError, match="empty"):
        held.updates(pad_id=0)
    held.add(trajectories(3), 3)
    with pytest.raises(ValueError, match="refill 3 after refill 3"):
        held.add(trajectories(3), 3)


def test_too_few_groups_for_the_updates_are_named() -> None:
    held = buffer(updates=8)
    held.add(trajectories(0), 0)
    with pytest.raises(ValueError, match="4 prompt groups cannot feed 8 updates"):
        held.updates(pad_id=0)
