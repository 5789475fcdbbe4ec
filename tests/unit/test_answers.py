"""Which answers are the same: self-written styles, the public benchmarks, and hostile input."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset

from powerflow_lit.tasks.answers import last_boxed, parsable, same_answer
from powerflow_lit.tasks.symbolic import SymbolicComparison

SHARED = Path(__file__).parents[3] / "shared" / "data" / "math"
BENCHMARKS = {
    "math500": 500, "olympiadbench": 675, "aime24_0726": 30, "amc23_1010": 40, "minerva_math": 272,
}  # fmt: skip

# a line each: an answer | the reference
SAME = r"""
50\% | 1/2
50\% | 0.5
50\% | 50
50 | 50\%
\frac{1}{2} | 50\%
33.3\% | 33.3
1,000 | 1000
1000 | 1,000
10,\!080 | 10080
11,\! 111,\! 111,\! 100 | 11111111100
58{,}500 | 58,500
\frac12 | 1/2
\frac 59 | \frac{5}{9}
\dfrac{17}{50} | 17/50
0.34 | \dfrac{17}{50}
\frac{270}7\text{ degrees} | \frac{270}{7}
90 | 90^\circ
90^{\circ} | 90^\circ
90° | 90
90\text{ degrees} | 90^\circ
90 degrees | 90^\circ
5\text{ cm} | 5
5 cm | 5
15\mbox{ cm}^2 | 15
864 | 864 \mbox{ inches}^2
5.4 \text{ cents} | 5.4
5.4 cents | 5.4 \text{ cents}
12 \text{ square units} | 12
3.2 \mathrm{~km} / \mathrm{h} | 3.2
x=5 | 5
5 | x=5
f(x) = 2x+1 | 2x+1
y = 2x + 3 | 2x+3
y=3+2x | y = 2x + 3
5x - 7y + 11z + 4 = 0 | 5x-7y+11z+4=0
7y - 5x - 11z = 4 | 5x - 7y + 11z + 4 = 0
1,2 | 2, 1
1 and 2 | 1,2
1\text{ and }2 | 2,1
x=1 \text{ or } x=2 | 1,2
\{1,2\} | 2,1
\left\{2,1\right\} | \{1, 2\}
(1,2) | \left( 1, 2 \right)
(3, \frac{\pi}{2}) | \left( 3, \frac{\pi}{2} \right)
(3, \pi/2) | \left( 3, \frac{\pi}{2} \right)
(r,\theta) = (3, \pi/2) | \left( 3, \frac{\pi}{2} \right)
[-2,7] | x \in [-2,7]
-2 \le x \le 7 | [-2,7]
(-\infty,2)\cup(3,\infty) | (3,\infty) \cup (-\infty, 2)
\begin{bmatrix} -1/3 \\ 2/3 \\ 5/3 \end{bmatrix} | \begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}
\begin{pmatrix} -\frac{1}{3} \\ \frac23 \end{pmatrix} | \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}
Evelyn | \text{Evelyn}
\text{evelyn} | \text{Evelyn}
\textbf{Evelyn} | \text{Evelyn}
even | \text{even}
C | \text{(C)}
(C) | C
\text{C} | (C)
\textbf{(C)} | C
\$18.90 | 18.9
18.90 | \$18.90
$18.90$ | 18.90
18.90 \text{ dollars} | \$18.90
\$32,348 | \$32,\!348
2516_{8} | 2516_8
2516 | 2516_8
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
1-\sqrt{19},1+\sqrt{19} | 1 \pm \sqrt{19}
\pm 2 | 2,-2
\{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5, 1-\sqrt5
1\frac{4}{5} | 9/5
1.8 | 1\frac{4}{5}
137.5 | 137 \frac{1}{2}
137 1/2 | 137 \frac{1}{2}
.35625 | 0.35625
6.72 \times 10^{-5} | .0000672
4.5 \times 10^{33} | 4.5e33
4.5\cdot10^{33} | 4.5e33
025 | 25
25 | 025
25.0 | 25
0.333333 | 1/3
3.14159 | \pi
11\sqrt{2} | 11\sqrt2
\sqrt{2}/2 | \frac{1}{\sqrt{2}}
6 - 5i | -5i+6
(b+2)(a+5) | (a+5)(b+2)
x^2+2x+1 | (x+1)^2
(n-1)(2-1) | n-1
-\frac{35}{9} | -35/9
\frac{-35}{9} | -\frac{35}{9}
5. | 5
\(5\) | 5
\text{5} | 5
2\pi | 2 \pi
\frac{4}{27}\cdot 999^4 | $\frac{4 \cdot 999^{4}}{27}$
\infty | +\infty
3,600 \text{ m} | 3600
10\% | \frac{1}{10}
\$36 | 36.00
x>2 | (2,\infty)
(2,\infty) | x > 2
-1./3 | -\frac13
100,200 | 100, 200
200,100 | 100, 200
3e8 | 3 \times 10^8
"""
DIFFERENT = r"""
0.5 | 50
50 | 0.5
50\% | 5
50\% | 51\%
\text{Evelyn} | \text{Navin}
neve | \text{even}
neve | even
2516_8 | 2516_9
2517 | 2516_8
(1,2) | (2,1)
(1,2) | [1,2]
(1,2] | (1,2)
1,2 | 1,2,3
1,1,2 | 1,2,2
5 | 3,5
3,5 | 5
(C) | (D)
A | \text{(B)}
1000 | 1001
1000000001 | 1000000000
3.89e-10 | 1.39e-10
3\cdot 10^{-10} | 3.1\cdot 10^{-10}
10^{-20} | 10^{-21}
0.33 | 1/3
3.14 | \pi
x=5 | y=5
1 \pm \sqrt{19} | 1+\sqrt{19}
2x+3 | 2x+4
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
3+2\mathrm{i} | 3
3\mathbf{i} + 2\mathbf{j} | 3\mathbf{i} + 2\mathbf{k}
5\text{ cm} | 6\text{ cm}
\text{even} | \text{odd}
(-\infty,2) | (-\infty,2]
1.6 | 1.5959
-5 | 5
\frac{1}{0} | 0
x<2 | x \le 2
x=1 | x=2
no solution | 0
i | 1
12 | 1,2
1 | 1,000
1 | 1\text{ or }2
2 | \sqrt{2}
ab | ba2
3\hat{i} + 2\hat{j} | 3\hat{i} + 2\hat{k}
3\hat i + 2\hat j | 3\hat i + 2\hat k
\vec{a} | \vec{b}
x \ge 2 | x>2
\overline{AB} | \overline{CD}
x^2+1 | x^2-1
\sin x | \cos x
\alpha | \beta
\mathbb{R} | \mathbb{Z}
\emptyset | 0
\angle A | \angle B
(0,9) \cup (9,36) | (0,36)
\text{Yes} | \text{No}
\log_2 3 | \log_3 2
\binom{5}{2} | \frac{5}{2}
\lfloor x \rfloor | x
n! | n
A \cup B | A \cap B
1:2 | 1:3
1:2 | 2:1
\triangle ABC | \triangle ABD
2^{10} | 2^{11}
\sqrt[3]{2} | \sqrt{2}
"""


def pairs(lines: str) -> list[tuple[str, str]]:
    found = [tuple(part.strip() for part in x.split(" | ")) for x in lines.strip().splitlines()]
    return [(answer, reference) for answer, reference in found]


STYLES = sorted({reference for _, reference in pairs(SAME)})


@pytest.mark.parametrize(("answer", "reference"), pairs(SAME))
def test_one_answer_in_two_spellings_is_the_same(answer: str, reference: str) -> None:
    assert same_answer(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), pairs(DIFFERENT))
def test_another_answer_is_not(answer: str, reference: str) -> None:
    assert not same_answer(answer, reference)


def references(name: str) -> list[str]:
    file = SHARED / f"{name}.parquet"
    if not file.is_file():
        pytest.skip(f"the public benchmark files are not beside this repository: no {file.name}")
    rows = Dataset.from_parquet(str(file))
    found = [str(row["ground_truth"][0]) for row in rows["reward_model"]]
    assert len(found) == BENCHMARKS[name]
    return found


def share_right(answers: list[str], given: list[str]) -> float:
    """Share of correct ones when each answer stands in a sentence as a model would write it."""
    responses = [
        f"Adding up, $x \\ne \\boxed{{}}$. So the answer is $\\boxed{{{a}}}$. Done {{."
        for a in answers
    ]
    boxes = [last_boxed(text) for text in responses]
    right = [b is not None and same_answer(b, r) for b, r in zip(boxes, given, strict=True)]
    return sum(right) / len(right)


def deranged(answers: list[str], seed: int) -> list[str]:
    """Another problem's answer for each problem, by a random cycle through all of them."""
    cycle = list(range(len(answers)))
    random.Random(seed).shuffle(cycle)
    following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [answers[following[i]] for i in range(len(answers))]


def test_each_style_matches_itself_and_few_match_another() -> None:
    assert len(STYLES) >= 40
    assert all(parsable(style) for style in STYLES)
    assert share_right(STYLES, STYLES) == 1.0
    assert share_right(deranged(STYLES, 0), STYLES) < 0.05


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "minerva_math"])
def test_a_benchmark_s_references_match_themselves_and_not_each_other(name: str) -> None:
    given = references(name)
    assert all(map(parsable, given))
    assert share_right(given, given) >= 0.99
    assert share_right(deranged(given, 0), given) < 0.05


def test_a_changed_digit_makes_a_benchmark_s_answer_wrong() -> None:
    """Units apart: a question names its own, so that `cm^3` for `cm^2` goes unnoticed."""
    given = [r for r in sorted(set(references("math500"))) if re.search(r"[1-9]", r)]
    given = [r for r in given if not re.search(r"mbox|\\text", r)]
    changed = [re.sub(r"[1-9]", lambda m: str(int(m[0]) % 9 + 1), r, count=1) for r in given]
    assert len(given) > 100
    assert share_right(changed, given) == 0.0


def test_the_quarter_of_minerva_s_references_that_is_cut_is_noticed() -> None:
    given = references("minerva_math")
    cut = [r for r in given if not parsable(r)]
    assert len(cut) == 68
    assert all(r.count("{") > r.count("}") for r in cut)
    whole = [r for r in given if parsable(r)]
    assert share_right(whole, whole) == 1.0
    assert share_right(cut, cut) == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{1} \\boxed{}", "1"),  # an empty box holds no answer
        ("write it in \\boxed{ }", None),
        ("\\boxed {5}", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed 5", None),  # TeX would box one digit of it
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{ x=1 \\right.}", "\\left\\{ x=1 \\right."),  # escaped: no brace
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{a \\boxed{7}", "7"),
        ("} \\boxed{3} {", "3"),
        ("1 \\\\\\boxed{2}", "2"),  # a line break before it
        ("\\\\boxed{2}", "2"),  # escaped twice, as in json
        ("\\boxed{\\text{line\nbreak}}", "\\text{line\nbreak}"),
    ],
)
def test_what_counts_as_a_box(response: str, answer: str | None) -> None:
    assert last_boxed(response) == answer


@pytest.mark.parametrize("reference", ["\\frac{1", "1}", "", " ", "{1", "\\boxed{"])
def test_a_reference_that_its_own_box_does_not_give_back_is_unparsable(reference: str) -> None:
    assert not parsable(reference)


HOSTILE = [
    "\\boxed{" * 3000, "{" * 20_000, "\\" * 20_001, "(" * 400, "\\frac" * 500, "9" * 5000,
    "1e999", "1e-999", "9^" * 300, "%" * 50, "," * 5000, "\\pm" * 100, "\x00", "\ud800", "=" * 300,
    "\\frac{" * 60 + "1" + "}{2}" * 60, "\\text{" * 40, " " * 20_000 + "x", "_" * 300, "(1,(2,(3",
]  # fmt: skip


def test_hostile_text_is_refused_quickly() -> None:
    start = time.process_time()
    for text in HOSTILE:
        assert last_boxed(text) is None
        for reference in ("3", "(1,2)", "\\frac{x}{2}", "5\\%"):
            assert not same_answer(text, reference), text[:20]
            assert not same_answer(reference, text), text[:20]
    assert time.process_time() - start < 5


@pytest.fixture(scope="module")
def impatient() -> Iterator[SymbolicComparison]:
    comparison = SymbolicComparison(cpu_seconds=0.5)
    yield comparison
    comparison.close()


def test_an_endless_comparison_ends_and_the_next_one_is_right(
    impatient: SymbolicComparison, caplog: pytest.LogCaptureFixture
) -> None:
    assert not impatient("9^{9^{9^{9}}}", "3")
    assert impatient.undecided == 1
    assert "0.5 s" in caplog.text
    assert impatient("x+1", "1+x")


def test_comparing_works_in_threads_and_leaves_the_host_s_alarm_alone(
    impatient: SymbolicComparison,
) -> None:
    rung = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rung.set())
    try:
        ours = signal.getsignal(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        questions = [(f"{i}+x", "x+3") for i in range(6)]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda q: impatient(*q), questions)) == [i == 3 for i in range(6)]
        assert impatient("\\sqrt{4}x", "2x")  # in the main thread
        assert signal.getsignal(signal.SIGALRM) is ours
        assert rung.wait(5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_comparison_that_lost_its_process_starts_another(impatient: SymbolicComparison) -> None:
    assert impatient("x+2", "2+x")
    process = impatient._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    undecided = impatient.undecided
    assert impatient("x+4", "4+x")
    assert impatient.undecided == undecided
    impatient.close()
    assert impatient("x+5", "5+x")


def test_plain_numbers_are_compared_without_math_verify() -> None:
    start = time.process_time()
    for i in range(20_000):
        assert same_answer(str(i), f"0{i}")
        assert not same_answer(str(i), str(i + 1))
    assert time.process_time() - start < 2
