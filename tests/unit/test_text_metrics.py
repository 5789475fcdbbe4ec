"""Diversity, votes and intervals against libraries, brute force and analytic cases."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from powerflow_lit.metrics import at_k, text
from powerflow_lit.metrics.bootstrap import bootstrap
from powerflow_lit.reporting import points, tables

SENTENCES = [
    "the cat sat on the mat and the dog sat on the rug",
    "the cat sat on the mat and the bird sat on the roof of the house",
    "a dog ran over the hill and the cat sat on the mat again",
    "the dog sat on the rug and the cat sat on the mat",
    "on the mat and the dog sat the cat on the rug",
]
WORDS = st.lists(st.lists(st.sampled_from("abcd"), max_size=9), min_size=2, max_size=6)


@settings(deadline=None)
@given(WORDS)
def test_self_bleu_is_sacrebleu_s_sentence_score_against_the_others(texts: list[list[str]]) -> None:
    lines = [" ".join(words) for words in texts]
    scores = [
        sacrebleu.sentence_bleu(line, lines[:i] + lines[i + 1 :], tokenize="none").score / 100
        for i, line in enumerate(lines)
    ]
    assert text.self_bleu(texts) == pytest.approx(mean(scores), abs=1e-9)


def test_self_bleu_is_nltk_s_where_every_order_has_a_match() -> None:
    texts = [line.split() for line in SENTENCES]
    scores = [sentence_bleu(texts[:i] + texts[i + 1 :], words) for i, words in enumerate(texts)]
    assert min(scores) > 0.1
    assert text.self_bleu(texts) == pytest.approx(mean(scores), abs=1e-9)


def test_self_bleu_of_copies_is_one_and_of_strangers_or_one_text_zero() -> None:
    assert text.self_bleu([list("abcde")] * 3) == pytest.approx(1.0)
    assert text.self_bleu([list("abcde"), list("fghij")]) == 0.0
    assert text.self_bleu([list("abcde")]) == text.self_bleu([]) == 0.0


@given(WORDS)
def test_rouge_l_is_the_rouge_score_library_s_f1(texts: list[list[str]]) -> None:
    a, b = texts[:2]
    if a and b:
        score = RougeScorer(["rougeL"]).score(" ".join(a), " ".join(b))["rougeL"].fmeasure
        assert text.rouge_l(a, b) == pytest.approx(score, abs=1e-12)


def test_the_vendi_score_counts_orthogonal_texts_and_no_copies() -> None:
    assert text.vendi_score(np.eye(5)) == pytest.approx(5)
    assert text.vendi_score(np.tile([0.6, 0.8], (7, 1))) == pytest.approx(1)
    groups = np.repeat(np.eye(3), [4, 2, 2], axis=0)  # three kinds, in shares 1/2, 1/4, 1/4
    assert text.vendi_score(groups) == pytest.approx(2 * 2**0.5)
    assert text.vendi_score(np.zeros((3, 4))) == pytest.approx(1)  # three empty texts
    assert text.vendi_score(np.zeros((0, 4))) == 0.0


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (1, 3)])
def test_the_vendi_score_is_the_entropy_of_the_embeddings_singular_values(
    shape: tuple[int, int],
) -> None:
    vectors = np.random.default_rng(0).normal(size=shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = np.linalg.svd(vectors, compute_uv=False) ** 2 / len(vectors)
    entropy = -sum(p * math.log(p) for p in shares.tolist())
    assert text.vendi_score(vectors) == pytest.approx(math.exp(entropy), rel=1e-9)


def test_empty_texts_are_copies_of_each_other() -> None:
    vectors = text.hashing_embedding(["", "", ""])
    assert text.cosine_diversity(vectors) == pytest.approx(0.0)
    assert text.cosine_diversity(text.hashing_embedding(["", "a b"])) == pytest.approx(1.0)


def test_lexical_diversity_of_many_texts_is_estimated_from_some_pairs() -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abcdefgh", k=12)) for _ in range(100)]
    exact = 1 - mean(text.rouge_l(a.split(), b.split()) for a, b in combinations(texts, 2))
    assert text.diversity_lexical(texts) == pytest.approx(exact, abs=0.01)
    assert text.diversity_lexical(texts) != exact
    few = texts[:64]
    exact = 1 - mean(text.rouge_l(a.split(), b.split()) for a, b in combinations(few, 2))
    assert text.diversity_lexical(few) == pytest.approx(exact, abs=1e-12)


@given(st.lists(st.sampled_from(["1", "1.0", "2", "2.0", "3", None]), min_size=1, max_size=9))
def test_maj_at_k_is_the_chance_that_a_random_plurality_winner_is_right(
    answers: list[str | None],
) -> None:
    def same(a: str, b: str) -> bool:
        return float(a) == float(b)

    values = [None if a is None else float(a) for a in answers]
    count = {v: values.count(v) for v in values if v is not None}
    winners = [v for v in count if count[v] == max(count.values())]
    brute = winners.count(2.0) / len(winners) if winners else 0.0
    votes = at_k.cluster(answers, same)
    assert at_k.maj_at_k([votes], [[v == 2.0 for v in values]]) == pytest.approx(brute)


def test_a_class_takes_what_equals_its_name_and_keeps_missing_answers_apart() -> None:
    def near(a: str, b: str) -> bool:
        return abs(int(a) - int(b)) <= 1

    assert at_k.cluster(["5", None, "6", "7", "4", "5"], near) == ["5", None, "5", "7", "5", "5"]


def test_the_report_s_intervals_are_these() -> None:
    values = np.array([[0.0, 1.0], [1.0, np.nan], [0.0, 0.0]])
    assert tables.bootstrap is points.bootstrap is bootstrap
    low, high = bootstrap(values, draws=400, level=0.9, seed=0)[0]
    assert 0 <= low < 1 / 3 < high <= 1
