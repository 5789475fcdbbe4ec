"""Correctness over k samples of a problem: avg@k, pass@k, maj@k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import comb


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Mean over problems of the share of correct samples."""
    return _mean([sum(row) / len(row) for row in correct])


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over problems of 1 - C(n-c, k) / C(n, k), the unbiased estimator (n >= k samples).

    Raises:
        ValueError: a problem has fewer than k samples.
    """
    scores = []
    for row in correct:
        n, c = len(row), sum(row)
        if n < k:
            raise ValueError(f"pass@{k} needs at least {k} samples a problem, got {n}")
        scores.append(1 - comb(n - c, k) / comb(n, k))
    return _mean(scores)


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]) -> float:
    """Mean over problems of the plurality answer's correctness; ties count fractionally.

    `answers` are extracted answers, equal ones spelt alike (see `cluster`); None where there is
    none: such samples do not vote.
    """
    scores = []
    for row, right in zip(answers, correct, strict=True):
        votes = Counter(a for a in row if a is not None)
        top = max(votes.values(), default=0)
        winners = {a for a, n in votes.items() if n == top}
        good = {a for a, ok in zip(row, right, strict=True) if ok}
        scores.append(len(winners & good) / len(winners) if winners else 0.0)
    return _mean(scores)


def cluster(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[str | None]:
    """Each answer's equivalence class, named by the first answer in it; None stays None.

    An answer joins the first class whose name it equals: what equals one name is equivalent, also
    where `same` is not transitive.
    """
    names: list[str] = []
    class_of: dict[str, str] = {}
    for answer in answers:
        if answer is not None and answer not in class_of:
            name = next((n for n in names if same(answer, n)), None)
            if name is None:
                names.append(name := answer)
            class_of[answer] = name
    return [None if a is None else class_of[a] for a in answers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
