"""What ranks tell each other: gathered rows keep their gradient, and no rank fails alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from powerflow_lit import ranks
from powerflow_lit.interrupt import Stopped
from powerflow_lit.rollout import EngineError
from tests.two_ranks import on_ranks


@pytest.mark.parametrize(("count", "world"), [(8, 2), (7, 3), (2, 3), (0, 2), (5, 1)])
def test_shares_are_the_whole_in_order_and_differ_by_one_at_most(count: int, world: int) -> None:
    parts = [ranks.share(count, of=number, among=world) for number in range(world)]
    row = list(range(count))
    assert [i for part in parts for i in row[part]] == row
    sizes = [len(row[part]) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_talks_to_nobody() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    assert ranks.gather_rows(rows, slice(0, 3), (3, 4)) is rows
    assert ranks.share_of_groups(torch.tensor([4, 4, 9])) == slice(0, 3)
    assert (ranks.world_size(), ranks.rank(), ranks.greatest(5), ranks.gather("a")) == (
        1, 0, 5, ["a"],
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"^as it is$"):
        ranks.gathered(lambda: _raise(EngineError("as it is")))


def _raise(error: BaseException) -> Any:
    raise error


def _ragged() -> dict[str, Any]:
    """Rank 0 has one group of three rows, rank 1 two groups of one and two, wider ones."""
    group = torch.tensor([7, 7, 7, 3, 5, 5])
    values = torch.arange(24, dtype=torch.float64).view(6, 4).sin()
    rows = ranks.share_of_groups(group)
    width = 2 if ranks.rank() == 0 else 4
    own = values[rows, :width].clone().requires_grad_()
    every = ranks.gather_rows(own, rows, (6, 4))
    (every.square().sum() * (1 + ranks.rank())).backward()
    return {"rows": rows, "every": every.detach(), "own": own.detach(), "grad": own.grad}


def test_gathered_rows_are_the_same_on_all_ranks_and_the_gradient_is_of_ones_own() -> None:
    first, second = on_ranks(_ragged)
    assert (first["rows"], second["rows"]) == (slice(0, 3), slice(3, 6))
    expected = torch.arange(24, dtype=torch.float64).view(6, 4).sin()
    expected[:3, 2:] = 0
    for number, found in enumerate((first, second)):
        assert torch.equal(found["every"], expected)
        assert torch.equal(found["grad"], 2 * (1 + number) * found["own"])


def _fails_on(number: int, kind: type[BaseException], arguments: tuple[Any, ...]) -> str:
    def work() -> int:
        if ranks.rank() == number:
            raise kind(*arguments)
        return ranks.rank()

    try:
        ranks.gathered(work)
    except BaseException as raised:
        # all ranks go on together: the next collective is the same one on each
        assert ranks.gather(ranks.rank()) == [0, 1, 2]
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


class Unreadable(Exception):  # noqa: N818
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (EngineError, ("it disagrees",), "EngineError: rank 1: it disagrees"),
        (Stopped, (15,), "Stopped: 143"),
        (Unreadable, (1, 2), "RankError: rank 1: Unreadable: 1 and 2"),
    ],
)
def test_what_one_rank_raises_all_raise(
    kind: type[BaseException], arguments: tuple[Any, ...], said: str
) -> None:
    assert on_ranks(_fails_on, 1, kind, arguments, world=3) == [said] * 3


def _talk() -> list[Any]:
    return [
        ranks.gathered(lambda: ranks.rank() + 10),
        ranks.greatest(15 * ranks.rank()),
        ranks.gather({"of": ranks.rank()}),
    ]


def test_all_ranks_hear_the_same() -> None:
    assert on_ranks(_talk) == [[[10, 11], 15, [{"of": 0}, {"of": 1}]]] * 2


def _too_few() -> str:
    with pytest.raises(ValueError, match="1 prompt groups cannot be shared by 2 ranks") as found:
        ranks.share_of_groups(torch.tensor([3, 3]))
    return str(found.value)


def test_a_rank_without_a_group_is_an_error() -> None:
    assert len(on_ranks(_too_few)) == 2
