"""Metrics against brute force and hand-computed values."""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerflow_lit.metrics import at_k, text
from powerflow_lit.tasks.boxed import last_boxed

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_chance_that_k_of_the_samples_hold_a_right_one(
    row: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(row)))
    brute = mean(any(chosen) for chosen in combinations(row, k))
    assert at_k.pass_at_k([row], k) == pytest.approx(brute, abs=1e-12)


def test_pass_at_k_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match="pass@4 needs at least 4"):
        at_k.pass_at_k([[True, False]], 4)


def test_maj_at_k_splits_ties_and_ignores_missing_answers() -> None:
    answers = [["1", "1", "2", None], ["3", "4", None, None], [None] * 4]
    correct = [[True, True, False, False], [False, True, False, False], [False] * 4]
    assert at_k.maj_at_k(answers, correct) == pytest.approx((1 + 0.5 + 0) / 3)
    assert at_k.avg_at_k(correct) == pytest.approx((0.5 + 0.25 + 0) / 3)


def naive_lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


@given(WORDS, WORDS)
def test_rouge_l_agrees_with_dynamic_programming(a: list[str], b: list[str]) -> None:
    if a or b:
        assert text.rouge_l(a, b) == pytest.approx(2 * naive_lcs(a, b) / (len(a) + len(b)))
    assert text.rouge_l(a, a) == 1.0
    assert SequenceMatcher(None, a, b).ratio() <= text.rouge_l(a, b) + 1e-12


def test_repetition_counts_grams_seen_before() -> None:
    assert text.repetition([1, 2, 3]) == 0.0
    assert text.repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert text.repetition([1] * 8) == pytest.approx(1 - 1 / 5)
    assert text.distinct_n([[1, 2, 3], [1, 2, 4]], n=2) == pytest.approx(3 / 4)


def test_diversity_is_zero_for_copies_and_one_for_strangers() -> None:
    assert text.diversity_lexical(["a b c"] * 3) == 0.0
    assert text.diversity_lexical(["a b", "c d"]) == 1.0
    assert text.diversity_semantic(["a b c"] * 3, text.hashing_embedding) == pytest.approx(0.0)
    assert text.diversity_semantic(["one"], text.hashing_embedding) == 0.0


def test_negative_cosines_count_as_zero() -> None:
    vectors = {"x": [1.0, 0.0], "-x": [-1.0, 0.0], "y": [0.0, 1.0]}

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([vectors[t] for t in texts])

    assert text.diversity_semantic(["x", "-x", "y"], embed) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{3} no, \\boxed{42}.", "42"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("the answer is 7", None),
        ("\\boxed{", None),
    ],
)
def test_the_last_complete_box_is_the_answer(response: str, answer: str | None) -> None:
    assert last_boxed(response) == answer
