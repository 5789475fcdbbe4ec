"""Repetition within a text and diversity between texts. N texts, d dimensions."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

Tokens = Sequence[int] | Sequence[str]
MOST_PAIRS = 2016  # those of 64 texts; 256 texts of 600 words would take 9 s a prompt
Embedder = Callable[[Sequence[str]], np.ndarray]  # texts -> (N, d), rows of unit length


def repetition(tokens: Tokens, n: int = 4) -> float:
    """rep-n: the share of n-grams that occurred before, 1 - unique/total; 0 if shorter than n."""
    grams = _ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(texts: Sequence[Tokens], n: int = 2) -> float:
    """Unique n-grams over all texts as a share of their total; 0 if there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F1 of two token lists: 2 LCS / (|a| + |b|); 1 for two empty ones."""
    return 2 * _lcs(a, b) / (len(a) + len(b)) if a or b else 1.0


def diversity_lexical(texts: Sequence[str]) -> float:
    """1 - mean pairwise ROUGE-L F1 over whitespace tokens; 0 for fewer than two texts.

    Of more than 64 texts, 2,016 pairs drawn once and for all stand for all of them.
    """
    split = [text.split() for text in texts]
    pairs = list(combinations(split, 2))
    if len(pairs) > MOST_PAIRS:
        pairs = random.Random(0).sample(pairs, MOST_PAIRS)
    scores = [rouge_l(a, b) for a, b in pairs]
    return 1 - sum(scores) / len(scores) if scores else 0.0


def diversity_semantic(texts: Sequence[str], embed: Embedder) -> float:
    """1 - mean pairwise cosine, negative cosines counted as 0 (arXiv 2510.01171).

    Comparable only between figures made with the same embedder.
    """
    return cosine_diversity(embed(texts)) if len(texts) > 1 else 0.0


def cosine_diversity(vectors: np.ndarray) -> float:
    """`diversity_semantic` of embedded texts, (N, d); 0 for fewer than two."""
    if len(vectors) < 2:
        return 0.0
    cosine = np.clip(_cosines(vectors), 0.0, None)
    rows, columns = np.triu_indices(len(vectors), k=1)
    return float(1 - cosine[rows, columns].mean())


def vendi_score(vectors: np.ndarray) -> float:
    """Effective number of different texts: exp of the entropy of K/N's eigenvalues, K the cosines.

    1 for copies, N for orthogonal embeddings, (N, d); 0 for no texts (arXiv 2210.02410).
    """
    if not len(vectors):
        return 0.0
    shares = np.linalg.eigvalsh(_cosines(vectors) / len(vectors))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """(N, d) of unit or zero rows -> (N, N); empty texts, embedded as zeros, are copies."""
    empty = ~vectors.any(axis=1)
    cosines: np.ndarray = vectors @ vectors.T + np.outer(empty, empty)
    return cosines


def self_bleu(texts: Sequence[Tokens]) -> float:
    """Mean BLEU-4 of each text against all the others as references; 1 for copies, 0 for one text.

    Smoothed and of effective order as sacrebleu's sentence score: an order of n-grams without a
    match counts as half a match, the next such one as a quarter and so on; orders that a text is
    too short for are left out; the length compared with is that of the nearest reference.
    """
    if len(texts) < 2:
        return 0.0
    lengths = [len(t) for t in texts]
    counts = [[Counter(_ngrams(t, n)) for t in texts] for n in range(1, 5)]  # (4, N)
    most = [_two_largest(order) for order in counts]
    return sum(_bleu_to_others(i, lengths, counts, most) for i in range(len(texts))) / len(texts)


_Gram = tuple[int | str, ...]


def _two_largest(counts: Sequence[Counter[_Gram]]) -> dict[_Gram, tuple[int, int, int]]:
    """Of each n-gram: its largest count in a text, that text, and the largest count elsewhere."""
    most: dict[_Gram, tuple[int, int, int]] = {}
    for i, grams in enumerate(counts):
        for gram, count in grams.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            if count > first:
                most[gram] = (count, i, first)
            elif count > second:
                most[gram] = (first, owner, count)
    return most


def _bleu_to_others(
    i: int,
    lengths: Sequence[int],
    counts: Sequence[Sequence[Counter[_Gram]]],
    most: Sequence[Mapping[_Gram, tuple[int, int, int]]],
) -> float:
    """BLEU-4 of text i against all other texts, 0 to 1."""
    logs: list[float] = []
    matched, smoothing = 0, 1.0
    for order, largest in zip(counts, most, strict=True):
        total = sum(order[i].values())
        if total == 0:
            break
        hits = 0
        for gram, count in order[i].items():
            first, owner, second = largest[gram]
            hits += min(count, second if owner == i else first)
        matched += hits
        smoothing *= 1 if hits else 2
        logs.append(math.log((hits or 1 / smoothing) / total))
    if not matched:
        return 0.0
    others = [length for j, length in enumerate(lengths) if j != i]
    nearest = min(others, key=lambda length: (abs(length - lengths[i]), length))
    brevity = min(0.0, 1 - nearest / lengths[i])
    return math.exp(brevity + sum(logs) / len(logs))


def hashing_embedding(texts: Sequence[str], dimensions: int = 512) -> np.ndarray:
    """Bag of hashed words and word pairs, unit length: a local, download-free embedder."""
    vectors = np.zeros((len(texts), dimensions))
    for row, text in enumerate(texts):
        words = text.lower().split()
        for gram in [(w,) for w in words] + list(pairwise(words)):
            digest = zlib.crc32(" ".join(gram).encode())
            vectors[row, digest % dimensions] += 1 if digest & 0x10000 else -1
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


def _ngrams(tokens: Tokens, n: int) -> list[tuple[int | str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over the positions of `a`."""
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    row, full = (1 << len(a)) - 1, (1 << len(a)) - 1
    for token in b:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()
