"""Repetition within a text and diversity between texts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np

Tokens = Sequence[int] | Sequence[str]
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
    """1 - mean pairwise ROUGE-L F1 over whitespace tokens; 0 for fewer than two texts."""
    split = [text.split() for text in texts]
    scores = [rouge_l(a, b) for a, b in combinations(split, 2)]
    return 1 - sum(scores) / len(scores) if scores else 0.0


def diversity_semantic(texts: Sequence[str], embed: Embedder) -> float:
    """1 - mean pairwise cosine, negative cosines counted as 0 (arXiv 2510.01171).

    Comparable only between figures made with the same embedder.
    """
    if len(texts) < 2:
        return 0.0
    vectors = embed(texts)
    cosine = np.clip(vectors @ vectors.T, 0.0, None)
    rows, columns = np.triu_indices(len(texts), k=1)
    return float(1 - cosine[rows, columns].mean())


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
