"""When two mathematical answers are the same (the rules, with examples: docs/scoring.md).

Text, numbers, percentages, units, lists and tuples are decided here; what is left goes to
math-verify, in a process that can be stopped.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from powerflow_lit.tasks.symbolic import compare

LONGEST = 400  # characters; a longer answer is compared as text only
DEEPEST = 8  # brackets within brackets; the grammar's time doubles with each further one
MOST_ELEMENTS = 24  # of a list; a longer one is compared as text only
DIGITS = Fraction(5, 10**6)  # a decimal stands for what it is when rounded to six digits

_BOX = re.compile(r"\\\\?(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` (or `\fbox{...}`) that holds anything.

    Nested braces are kept, escaped ones are no braces. None if there is none: an empty box, a box
    that never closes and a box without braces (`\boxed 5`) hold no answer.
    """
    opened: list[int | None] = []  # of each open brace: where the content of its box starts
    last: tuple[int, int] | None = None
    for match in _BOX.finditer(text):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None and text[start : match.start()].strip():
                last = max(last or (start, 0), (start, match.start()))
        elif token == "{":
            opened.append(None)
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())
    return None if last is None else text[last[0] : last[1]].strip()


def parsable(reference: str) -> bool:
    r"""Whether any response can match this reference: it must come out of its own `\boxed{}`."""
    boxed = last_boxed(f"\\boxed{{{reference}}}")
    return boxed is not None and boxed == reference.strip() and bool(_clean(reference))


@lru_cache(maxsize=8192)
def same_answer(answer: str, reference: str) -> bool:
    """Whether an extracted answer means the same as the reference. Not symmetric in all cases.

    Raises:
        TaskError: math-verify is needed and cannot be started.
    """
    if answer.isdecimal() and reference.isdecimal() and max(len(answer), len(reference)) < 100:
        return int(answer) == int(reference)
    return _same(_clean(answer), _clean(reference))


def same_text(a: str, b: str) -> bool:
    """Whether two texts differ at most in what carries no meaning: spaces, capitals, dollars."""
    return _key(_clean(a)).casefold() == _key(_clean(b)).casefold() != ""


def _same(a: str, b: str) -> bool:
    if not a or not b:
        return False
    if _key(a) == _key(b):
        return True
    if max(len(a), len(b)) > LONGEST:
        return False
    if _is_word(a) or _is_word(b):
        return _word(a) == _word(b)
    a, b = _without_name(a, b)
    if a.endswith("%") or b.endswith("%"):
        return _same_percentage(a, b)
    based = _BASED.fullmatch(a), _BASED.fullmatch(b)
    if any(based):
        return _same_digits(a, b)
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return _same_number(*x, *y)
    s, t = _structure(a), _structure(b)
    if x and t and t[0] == "list" and "," in a:
        s = "list", _split(a, ",")  # 100,200 is a number, but not beside 100, 200
    if y and s and s[0] == "list" and "," in b:
        t = "list", _split(b, ",")
    if s and t:
        return _same_structure(s, t)
    if (s or t) and not _RELATION.search(a + b):
        return False
    return max(_depth(a), _depth(b)) <= DEEPEST and compare(a, b)


# --- text

_UNIT = r"\\text\{[~\s]*(?:[A-Za-z]{2}[A-Za-z.\s~/]*|[mgshLlVWJNKACF])\}(?:\^(?:-?\d|\{-?\d\}))?"
_REPLACEMENTS = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r",(?:\\!|\{\})\s*(?=\d)", ","),
        (r"(?<!\\)\\(?:[!()\[\]]|displaystyle\b)|\\?\$", ""),
        (r"(?<!\\)\\(?=\s|$)|(?<!\\)\\[,;:>]|~|\\q?quad\b|[\s\u00a0]+", " "),
        (r"\{\s*,\s*\}", ","),
        (r"\\(?:left|right|[bB]igg?[lr]?)\s*(?=[()\[\]|.]|\\[{}])", ""),
        (r"\\[dtc]frac\b", r"\\frac"),
        (r"\\(?:mathrm|mbox|textrm|textnormal|textbf|textit|textsf)\b", r"\\text"),
        (r"\\text\s*\{", r"\\text{"),
        (r"\\(?:mathbf|boldsymbol|bm|hat|vec)\s*(?:\{\s*(\w)\s*\}|(?<![a-z])(\w)\b)", r"\1\2 "),
        (r"\\(leq|geq|neq)(?:slant)?\b", lambda m: "\\" + m[1][:2]),
        (r"(?:\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|\\degree\b|°)(?=\s*(?:$|[,;)\]]|\\text))", ""),
        (r"\\frac\s*(\d|[a-z])\s*(\d|[a-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-z])", r"\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (r"\\?%", "%"),
        (r"\b[bpBV]matrix\b", "pmatrix"),
        (r" (?:and|or) |\\text\{\s*,?\s*(?:and|or)\s*\}", ","),
        ("\u2212", "-"),
        ("\u03c0", r"\\pi "),
        ("\u221e", r"\\infty "),
        ("\u00d7", r"\\times "),
        ("\u00b1", r"\\pm "),
        ("\u222a", r"\\cup "),
        ("\u2264", r"\\le "),
        ("\u2265", r"\\ge "),
    )
]
_TRAILING_UNIT = re.compile(rf"(?<=[\w}})\]])(?:\s*/?\s*{_UNIT})+$")


def _clean(text: str) -> str:
    """LaTeX without what carries no meaning here: dollars, spacing, sizes, degrees, units."""
    if len(text) > 20 * LONGEST:
        return text.strip()
    for pattern, by in _REPLACEMENTS:
        text = pattern.sub(by, text)
    text = text.strip().rstrip(".,;").removeprefix("+").strip()
    return _TRAILING_UNIT.sub("", text).strip()


def _key(text: str) -> str:
    return text.replace(" ", "")


_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_OPTION = re.compile(r"\(?([A-Z])\)?[.:]?")


def _is_word(text: str) -> bool:
    """Text rather than a product of variables: in a text command, or four letters and more."""
    return bool(_TEXT.fullmatch(text) or re.fullmatch(r"[A-Za-z]{4,}(?: [A-Za-z]+)*", text))


def _word(text: str) -> str:
    """A word in one spelling: without its text command, small; an option's letter stays as is."""
    inner = _TEXT.fullmatch(text)
    text = (inner.group(1) if inner else text).strip().rstrip(".")
    option = _OPTION.fullmatch(text)
    return option.group(1) if option else text.casefold()


# --- one name, percent, base

_NAME = re.compile(
    r"(?:(?:[A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?\s*(?:\([a-z](?:\s*,\s*[a-z])*\))?"
    r"|\((?:[a-z]|\\[a-z]+)(?:\s*,\s*(?:[a-z]|\\[a-z]+))+\))\s*(?:=|\\in\b)(?!.*=)"
)
_BASED = re.compile(r"(\w+)\s*_\s*(?:(\d)|\{(\d+)\})(?<=[\d}])")


def _without_name(a: str, b: str) -> tuple[str, str]:
    """`x=5` beside a bare `5` loses its name; two named answers keep theirs."""
    named, other = _NAME.match(a), _NAME.match(b)
    if named and not other:
        return a[named.end() :].strip(), b
    if other and not named:
        return a, b[other.end() :].strip()
    return a, b


def _same_percentage(a: str, b: str) -> bool:
    """50% is 50, as the question asked for percent, and is 1/2, its value."""
    bare = a.rstrip("% "), b.rstrip("% ")
    if _same(*bare):
        return True
    if a.endswith("%") and b.endswith("%"):
        return False
    hundredth = [f"\\frac{{{t}}}{{100}}" if s.endswith("%") else s
                 for s, t in zip((a, b), bare, strict=True)]  # fmt: skip
    ours, theirs = map(_number, bare)
    if ours and theirs:
        x, y = (ours[0] / 100, theirs[0]) if a.endswith("%") else (ours[0], theirs[0] / 100)
        return _same_number(x, ours[1], y, theirs[1])
    return all(bare) and _same(*hundredth)


def _same_digits(a: str, b: str) -> bool:
    """Digits of the same base; a base that only one of them names is the question's."""
    (x, base), (y, other) = _digits(a), _digits(b)
    return x == y and (base is None or other is None or base == other)


def _digits(text: str) -> tuple[str, str | None]:
    match = _BASED.fullmatch(text)
    return (match[1], match[2] or match[3]) if match else (_key(text), None)


# --- numbers

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<digits>{_DECIMAL})"
    r"(?:[eE](?P<e>[+-]?\d{1,3})"
    r"| ?(?:\\times|\\cdot|\*) ?10\^(?:(?P<p>\d)|\{(?P<q>[+-]?\d{1,3})\}))?"
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?) ?(?:(?P<whole>\d{1,9}) ?)?\\frac ?"
    r"\{ ?(?P<n>-?\d{1,99})\.? ?\} ?\{ ?(?P<d>-?\d{1,99}) ?\}"
    r"|(?P<sign2>[+-]?) ?(?:(?P<whole2>\d{1,9}) )?(?P<n2>\d{1,99})\.? ?/ ?(?P<d2>\d{1,99})"
)


@lru_cache(maxsize=8192)
def _number(text: str) -> tuple[Fraction, bool] | None:
    """Its value, and whether it is a decimal, that is perhaps rounded; None for anything else."""
    if len(text) > 200:
        return None
    if (match := _RATIO.fullmatch(text)) is not None:
        sign, whole, n, d = (match[k] or match[f"{k}2"] for k in ("sign", "whole", "n", "d"))
        if int(d) == 0:
            return None
        value = int(whole or 0) + Fraction(int(n), int(d))
        return (-value if sign == "-" else value), False
    match = _NUMBER.fullmatch(text)
    if match is None or not re.search(r"\d", match["digits"]):
        return None
    value = Fraction(match["digits"].replace(",", "").removesuffix("."))
    exponent = match["e"] or match["p"] or match["q"]
    value *= Fraction(10) ** int(exponent or 0)
    return (-value if match["sign"] == "-" else value), "." in text or match["e"] is not None


def _same_number(x: Fraction, x_decimal: bool, y: Fraction, y_decimal: bool) -> bool:
    """Equal; where one is a decimal, equal in six digits (five places, where there are more)."""
    return abs(x - y) <= (DIGITS * min(Fraction(1), abs(y)) if x_decimal or y_decimal else 0)


# --- lists, sets, tuples, intervals

_RELATION = re.compile(r"[<>|]|\\(?:le|ge|lt|gt|in|cup|begin|mathbb|infty|pm|mp)\b")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)\b")
_Structure = tuple[str, list[str]]  # kind ("list", "union", or the two brackets), elements


def _structure(text: str) -> _Structure | None:
    """The parts of a list, a set (a list too), a union, a tuple or an interval."""
    parts = _split(text, ",;")
    if len(parts) > 1:
        return (
            ("list", [e for p in parts for e in _both_signs(p)]) if _number(text) is None else None
        )
    if len(parts := _split(text, "\\cup")) > 1:
        return "union", parts
    if text.startswith("\\{") and text.endswith("\\}") and _closes_at_end(text):
        inner = text[2:-2].strip()
        return "list", [e for p in _split(inner, ",;") for e in _both_signs(p)]
    if text[0] in "([" and text[-1] in ")]" and _closes_at_end(text):
        parts = _split(text[1:-1].strip(), ",;")
        return (text[0] + text[-1], parts) if len(parts) > 1 else None
    signs = _both_signs(text)
    return ("list", signs) if len(signs) > 1 else None


def _same_structure(s: _Structure, t: _Structure) -> bool:
    (kind, ours), (other, theirs) = s, t
    if len(ours) != len(theirs) or len(ours) > MOST_ELEMENTS:
        return False
    if kind == other and kind in ("list", "union"):
        left = list(theirs)
        for element in ours:
            found = next((e for e in left if same_answer(element, e)), None)
            if found is None:
                return False
            left.remove(found)
        return True
    # a tuple without its brackets is that tuple, in its order
    return {kind, other} in ({kind}, {"list", "()"}) and all(map(same_answer, ours, theirs))


def _both_signs(text: str) -> list[str]:
    r"""`a \pm b` as the two values it stands for."""
    if len(_PLUS_MINUS.findall(text)) != 1:
        return [text]
    return [_PLUS_MINUS.sub(sign, text).strip().removeprefix("+").strip() for sign in "+-"]


def _split(text: str, separators: str) -> list[str]:
    """At separators (any of these characters, or this command) that stand in no brackets."""
    parts, depth, start, position = [], 0, 0, 0
    command = separators if separators.startswith("\\") else None
    while position < len(text):
        step = 2 if text[position] == "\\" else 1
        depth += _turn(text[position : position + step])
        if depth == 0 and (
            text.startswith(command, position) if command else text[position] in separators
        ):
            step = len(command) if command else 1
            parts.append(text[start:position].strip())
            start = position + step
        position += step
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens the text closes at its end."""
    depth = 0
    tokens = re.findall(r"\\.|.", text)
    for i, token in enumerate(tokens):
        depth += _turn(token)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def _depth(text: str) -> int:
    depth = deepest = 0
    for token in re.findall(r"\\.|.", text):
        depth += _turn(token)
        deepest = max(deepest, depth)
    return deepest


def _turn(token: str) -> int:
    return (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
