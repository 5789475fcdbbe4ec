"""What the processes of one run, its ranks, tell each other; with one process all is the identity.

Pure helpers over `torch.distributed`, for whichever strategy has set the group up. Each is a
collective unless it says otherwise: all ranks must call it, in the same order. Python objects and
flags travel over gloo, on the CPU, also where gradients go over NCCL.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_beside: dict[str, Any] = {}  # the default group, and the one beside it for objects


class RankError(RuntimeError):
    """Another rank went wrong; the message names it and what it said."""


def world_size() -> int:
    """Number of ranks; 1 before they have met. No collective."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; 0 before the ranks have met. No collective."""
    return dist.get_rank() if world_size() > 1 else 0


def share(count: int, *, of: int | None = None, among: int | None = None) -> slice:
    """The part of `count` things in a row that is a rank's own; no collective.

    The parts of all ranks, one after the other, are the whole row; sizes differ by one at most.

    Args:
        of: whose part; None is this rank's.
        among: number of ranks; None is this run's.
    """
    one, ranks = rank() if of is None else of, world_size() if among is None else among
    return slice(one * count // ranks, (one + 1) * count // ranks)


def share_of_groups(group: Tensor) -> slice:
    """The rows of this rank's share of the groups, which stand together; no collective.

    Args:
        group: (N,) equal for the rows of a group.

    Raises:
        ValueError: fewer groups than ranks.
    """
    if world_size() == 1:
        return slice(0, len(group))
    sizes = torch.unique_consecutive(group, return_counts=True)[1].tolist()
    if len(sizes) < world_size():
        raise ValueError(f"{len(sizes)} prompt groups cannot be shared by {world_size()} ranks")
    own = share(len(sizes))
    start = sum(sizes[: own.start])
    return slice(start, start + sum(sizes[own]))


def gather_rows(own: Tensor, rows: slice, shape: Sequence[int]) -> Tensor:
    """The rows of all ranks, zero where a rank's are narrower; the gradient is of one's own alone.

    Args:
        own: this rank's rows, of up to the widths of `shape`.
        rows: where they stand.
        shape: of the whole.
    """
    if world_size() == 1 and own.shape == tuple(shape):
        return own
    padding = [(0, whole - width) for width, whole in zip(own.shape[1:], shape[1:], strict=True)]
    own = torch.nn.functional.pad(own, [side for pair in reversed(padding) for side in pair])
    if world_size() == 1:
        return own
    every = own.new_zeros(tuple(shape))
    every[rows] = own.detach()
    dist.all_reduce(every)  # each row is one rank's, and zero on the others: a sum changes none
    return torch.cat([every[: rows.start], own, every[rows.stop :]])


def gather(value: T) -> list[T]:
    """The picklable values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


def gathered(work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, in their order; what it raises on one is raised on all.

    `work` itself must hold no collective: a rank that fails in it goes on to tell the others.

    Raises:
        BaseException: that of the first rank that failed; a message says which it was. What cannot
            be pickled reaches the others as a RankError.
    """
    if world_size() == 1:
        return [work()]
    value, error = None, None
    try:
        value = work()
    except BaseException as raised:
        if not isinstance(raised, Exception | SystemExit) or getattr(raised, "at_once", False):
            raise  # nobody wants to wait for the others
        error = raised
    answers = gather((value, None if error is None else portable(error)))
    for number, (_, failed) in enumerate(answers):
        if failed is not None:
            raise _named(failed, number) from error
    return [answer for answer, _ in answers]  # type: ignore[misc]


def together(error: BaseException | None) -> None:
    """Raises on all ranks what one of them has met; nothing where none has."""

    def work() -> None:
        if error is not None:
            raise error

    gathered(work)


def greatest(number: int) -> int:
    """The greatest of all ranks' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_group())
    return int(found)


def _group() -> Any:
    """A group whose tensors are on the CPU: the default one, or one beside it."""
    if dist.get_backend() == "gloo":
        return None
    if _beside.get("of") is not dist.group.WORLD:
        _beside.update(of=dist.group.WORLD, group=dist.new_group(backend="gloo"))
    return _beside["group"]


def portable(error: BaseException) -> BaseException:
    """The error itself where the others can read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"{type(error).__name__}: {error}")
    return error


def _named(error: BaseException, number: int) -> BaseException:
    """With the rank that met it first: work may have parts that are told to all as well."""
    said = error.args[0] if isinstance(error, Exception) and error.args else None
    if isinstance(said, str) and not re.match(r"rank \d+: ", said):
        error.args = (f"rank {number}: {said}", *error.args[1:])
    return error
