"""A corpus of arithmetic chains of thought, in the image of a real base model's faults.

A problem is a chain of additions and subtractions whose running values stay in 0..39. Its
solutions come in three styles of clearly different length and reliability (full chain, merged
steps, direct answer), some lack the `\\boxed{}`, and two self-reinforcing loops (a filler word,
re-check lines) make average-log-prob objectives hackable, as they are on real models. Wording is
random at every step, so that a long correct solution loses to a short wrong one on the *summed*
log-prob. Standard library only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

MAX_VALUE = 39
SPLITS = ("pretrain", "train", "eval")
Split = Literal["pretrain", "train", "eval"]
Style = Literal["full", "merged", "direct"]


@dataclass(frozen=True)
class CorpusSettings:
    """Frequencies of the corpus (probabilities unless said otherwise)."""

    operands: tuple[int, int] = (3, 6)
    # full, merged, direct: no connective is as likely a first word as the direct answer's, so that
    # greedy decoding falls for it, while the full chain wins per token
    style: tuple[float, float, float] = (0.52, 0.13, 0.35)
    step_error: float = 0.10
    merged_error: float = 0.35
    direct_correct: float = 0.15
    unboxed: float = 0.10
    filler_enter: float = 0.02
    filler_continue: tuple[float, float] = (0.5, 0.95)  # first, limit
    recheck_enter: float = 0.10
    recheck_continue: tuple[float, float] = (0.35, 0.93)  # first, limit


# (word, weight): together about 2.8 nats of wording a step
CONNECTIVES = (("Then", 5), ("Next,", 4), ("Now", 3), ("So", 2), ("Well,", 2), ("And", 1))
VERBS = (("gives", 5), ("makes", 4), ("is", 3), ("equals", 3), ("becomes", 2), ("yields", 1))
FILLER = "hmm"


@dataclass(frozen=True)
class Problem:
    """`operands[0] (signs[0]) operands[1] ...`, with every running value in 0..39."""

    operands: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def expression(self) -> str:
        parts = [str(self.operands[0])]
        for sign, operand in zip(self.signs, self.operands[1:], strict=True):
            parts += [sign, str(operand)]
        return " ".join(parts)

    @property
    def answer(self) -> int:
        value = self.operands[0]
        for sign, operand in zip(self.signs, self.operands[1:], strict=True):
            value = apply(value, sign, operand)
        return value

    @property
    def prompt(self) -> str:
        return f"Compute {self.expression}. Put the final answer in \\boxed{{}}."

    @property
    def split(self) -> Split:
        """Which split the problem belongs to, by a hash of its text: the three are disjoint."""
        digest = hashlib.sha256(self.expression.encode()).digest()[0]
        return "eval" if digest < 16 else "train" if digest < 48 else "pretrain"


def apply(value: int, sign: str, operand: int) -> int:
    return value + operand if sign == "+" else value - operand


def sample_problem(rng: random.Random, settings: CorpusSettings) -> Problem:
    value = rng.randint(1, MAX_VALUE)
    operands, signs = [value], []
    for _ in range(rng.randint(*settings.operands) - 1):
        can_add, can_subtract = value < MAX_VALUE, value > 0
        sign = rng.choice([s for s, ok in (("+", can_add), ("-", can_subtract)) if ok])
        operand = rng.randint(1, MAX_VALUE - value if sign == "+" else value)
        value = apply(value, sign, operand)
        operands.append(operand)
        signs.append(sign)
    return Problem(tuple(operands), tuple(signs))


def problems(split: Split, seed: int, settings: CorpusSettings | None = None) -> Iterator[Problem]:
    """Endless stream of distinct problems of one split."""
    settings = settings or CorpusSettings()
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while True:
        problem = sample_problem(rng, settings)
        if problem.split == split and problem.expression not in seen:
            seen.add(problem.expression)
            yield problem


def sample_solution(problem: Problem, rng: random.Random, settings: CorpusSettings) -> str:
    """One solution text, right or wrong, in one of the three styles."""
    style: Style = rng.choices(("full", "merged", "direct"), weights=settings.style)[0]
    pieces: list[str] = []
    if style == "direct":
        right = rng.random() < settings.direct_correct
        answer = problem.answer if right else _slip(problem.answer, rng, span=12)
    else:
        answer = _write_steps(problem, style, rng, settings, pieces)
    boxed = rng.random() >= settings.unboxed
    pieces.append(f"Answer: \\boxed{{{answer}}}" if boxed else f"Answer: {answer}")
    return " ".join(pieces)


def _write_steps(
    problem: Problem, style: Style, rng: random.Random, settings: CorpusSettings, pieces: list[str]
) -> int:
    value = problem.operands[0]
    terms = list(zip(problem.signs, problem.operands[1:], strict=True))
    per_line = 2 if style == "merged" else 1
    error = settings.merged_error if style == "merged" else settings.step_error
    for start in range(0, len(terms), per_line):
        line = terms[start : start + per_line]
        result = value
        for sign, operand in line:
            result = apply(result, sign, operand)
        result = min(max(result, 0), MAX_VALUE)
        if rng.random() < error:
            result = _slip(result, rng, span=3)
        expression = f"{value} " + " ".join(f"{s} {o}" for s, o in line)
        pieces.append(f"{_pick(CONNECTIVES, rng)} {expression} {_pick(VERBS, rng)} {result}.")
        for _ in range(_run_length(settings.recheck_enter, settings.recheck_continue, rng)):
            pieces.append(f"Check: {expression} {_pick(VERBS, rng)} {result}.")
        pieces += [FILLER] * _run_length(settings.filler_enter, settings.filler_continue, rng)
        value = result
    return value


def _slip(value: int, rng: random.Random, span: int) -> int:
    """A wrong value near `value`: off by 1..span, or by 10."""
    choices = [value + d for d in (*range(-span, span + 1), -10, 10) if d]
    return rng.choice([c for c in choices if 0 <= c <= MAX_VALUE])


def _pick(words: tuple[tuple[str, int], ...], rng: random.Random) -> str:
    return rng.choices([w for w, _ in words], weights=[n for _, n in words])[0]


def _run_length(enter: float, continues: tuple[float, float], rng: random.Random) -> int:
    """Length of a self-reinforcing run: the chance to go on rises from first to limit."""
    if rng.random() >= enter:
        return 0
    first, limit = continues
    length = 1
    while length < 40 and rng.random() < limit - (limit - first) * 0.6 ** (length - 1):
        length += 1
    return length


def documents(seed: int, settings: CorpusSettings | None = None) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) pairs for pretraining."""
    settings = settings or CorpusSettings()
    rng = random.Random(f"documents-{seed}")
    for problem in problems("pretrain", seed, settings):
        yield problem.prompt, sample_solution(problem, rng, settings)


def vocabulary_texts() -> list[str]:
    """Texts that together use every word of the corpus (for building the tokenizer)."""
    numbers = range(MAX_VALUE + 1)
    lines = ["Compute 1 + 2 - 3. Put the final answer in \\boxed{}.\n", f"Check: 1 {FILLER}"]
    lines += [f"{c} 1 {v} 2." for c, _ in CONNECTIVES for v, _ in VERBS]
    lines += [f"Answer: \\boxed{{{n}}}" for n in numbers] + [f"Answer: {n}" for n in numbers]
    # either form of a word may start a response
    lines += [w for w, _ in CONNECTIVES] + [f" {w}" for w, _ in CONNECTIVES]
    return [*lines, "Check:", " Check:", FILLER, "Answer:", " Answer:"]
