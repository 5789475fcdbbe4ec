"""A corpus of jokes, poems and stories from a grammar: an "aligned", mode-collapsed writer.

A piece is drawn slot by slot; each slot's options are ranked in an order that depends on the
prompt, with probability proportional to rank^-2.5, so that the writer repeats itself though it
knows more. Lengths really differ: jokes of 1 or 2 lines, poems of 2 to 4 (couplets must rhyme),
stories of 4 to 6; a few ramble on. `parse` decides whether a text is a valid piece for its prompt
and which mode (the choices that make its idea) it belongs to. Standard library only.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

KINDS = ("joke", "poem", "story")
TOPICS = (
    "cat", "dog", "fox", "owl", "frog", "crow", "goat", "mouse",
    "bear", "wolf", "duck", "horse", "whale", "snail", "robot", "ghost",
)  # fmt: skip
RANK_EXPONENT = 2.5
# A few pieces ramble past their form's longest length (and are invalid): as with real models, long
# junk has a little mass, which matching p^alpha on whole strings (alpha < 1) blows up.
RAMBLE = 0.006
RAMBLE_ON = 0.75  # chance of one more line (story) or couplet (poem)

SLOTS: dict[str, tuple[str, ...]] = {
    "adjective": ("old", "shy", "proud", "sleepy", "brave", "tiny", "clever", "lonely"),
    "place": ("market", "forest", "castle", "harbor", "library", "desert", "kitchen", "island"),
    "friend": ("king", "baker", "witch", "sailor", "farmer", "child", "thief", "painter"),
    "thing": ("lamp", "drum", "letter", "crown", "kite", "ladder", "teapot", "mirror"),
    "act": ("found", "broke", "painted", "hid", "sold", "built", "dropped", "stole"),
    "mood": ("laughed", "wept", "danced", "slept", "sang", "argued", "waited", "prayed"),
    "time": ("morning", "evening", "winter", "summer", "sunday", "midnight", "spring", "autumn"),
    "motion": ("runs", "sings", "dreams", "jumps", "hums", "walks", "hides", "shines"),
}
# rhyming pairs of line ends; a couplet must take both from one family
RHYMES: dict[str, tuple[str, ...]] = {
    "ay": ("day", "bay", "hay"),
    "ight": ("night", "light", "kite"),
    "oon": ("moon", "dune", "tune"),
    "ee": ("sea", "tree", "bee"),
    "ow": ("snow", "bow", "crow"),
    "ing": ("ring", "king", "wing"),
}
# lines of a piece, in order; a tuple of alternatives is one line, chosen as a slot of its own
JOKE_SETUPS = (
    "Why did the {topic} bring a {thing} to the {place}?",
    "My {topic} met a {friend} with a {thing}.",
    "How does a {adjective} {topic} use a {thing}?",
    "The {friend} gave the {topic} a {thing}.",
)
JOKE_PUNCHLINES = ("Because the {friend} {mood}.", "It {mood} in the {place}.")
COUPLET = ("The {topic} {motion} beside the {rhyme},", "and {motion} again below the {rhyme}.")
POEM_CLOSE = "O {adjective} {topic}!"
STORY_OPENING = "One {time} a {adjective} {topic} went to the {place}."
STORY_MEETING = "There it met a {adjective} {friend}."
STORY_EVENT = "They {act} a {thing}."
STORY_ENDING = "Then the {topic} {mood}."


@dataclass(frozen=True)
class Request:
    """A kind of piece about a topic."""

    kind: str
    topic: str

    @property
    def prompt(self) -> str:
        return f"Write a short {self.kind} about a {self.topic}."


@dataclass(frozen=True)
class Parsed:
    """A valid piece. Its mode is its idea: a joke's setup and thing, a poem's first rhyme and
    motion, a story's place and friend."""

    mode: tuple[str, ...]


def requests() -> list[Request]:
    """All 48 prompts, in a fixed order."""
    return [Request(kind, topic) for kind, topic in product(KINDS, TOPICS)]


def compose(request: Request, rng: random.Random) -> str:
    """One piece for the request."""
    return _Writer(request, rng).piece()


class _Writer:
    """Draws a piece slot by slot, each from the prompt's own ranking of the options."""

    def __init__(self, request: Request, rng: random.Random) -> None:
        self.request, self.rng = request, rng

    def piece(self) -> str:
        lines = {"joke": self._joke, "poem": self._poem, "story": self._story}[self.request.kind]()
        return "\n".join(lines)

    def _joke(self) -> list[str]:
        lines = [self._fill(self._pick("setup", JOKE_SETUPS), "setup")]
        if self.rng.random() < 0.5:
            lines.append(self._fill(self._pick("punchline", JOKE_PUNCHLINES), "punchline"))
        return lines

    def _poem(self) -> list[str]:
        couplets, close = self.rng.choice(((1, False), (1, True), (2, False)))
        extra = self._ramble()
        couplets, close = (2 + extra, False) if extra else (couplets, close)
        lines = []
        for number in range(couplets):
            number = min(number, 1)
            family = self._pick(f"family{number}", tuple(RHYMES))
            for position, line in enumerate(COUPLET):
                rhyme = self._pick(f"rhyme{position}{family}", RHYMES[family])
                lines.append(self._fill(line.replace("{rhyme}", rhyme), f"c{number}{position}"))
        return [*lines, self._fill(POEM_CLOSE, "close")] if close else lines

    def _story(self) -> list[str]:
        extra = self._ramble()
        events = 3 + extra if extra else self.rng.choice((1, 2, 3))
        lines = [self._fill(STORY_OPENING, "opening"), self._fill(STORY_MEETING, "meeting")]
        lines += [self._fill(STORY_EVENT, f"event{min(i, 2)}") for i in range(events)]
        return [*lines, self._fill(STORY_ENDING, "ending")]

    def _ramble(self) -> int:
        """Lines too many; mostly none."""
        extra = 0
        if self.rng.random() < RAMBLE:
            extra = 1
            while extra < 8 and self.rng.random() < RAMBLE_ON:
                extra += 1
        return extra

    def _fill(self, line: str, where: str) -> str:
        line = line.replace("{topic}", self.request.topic)
        for slot in re.findall(r"\{(\w+)\}", line):
            line = line.replace(f"{{{slot}}}", self._pick(f"{where}-{slot}", SLOTS[slot]), 1)
        return line

    def _pick(self, slot: str, options: tuple[str, ...]) -> str:
        ranked = _ranked(self.request.prompt, slot, options)
        weights = [rank**-RANK_EXPONENT for rank in range(1, len(ranked) + 1)]
        return self.rng.choices(ranked, weights=weights)[0]


@cache
def _ranked(prompt: str, slot: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """The prompt's own order of a slot's options."""
    return tuple(
        sorted(options, key=lambda o: hashlib.sha256(f"{prompt}|{slot}|{o}".encode()).digest())
    )


# --- parsing -------------------------------------------------------------------------------------


def parse(request: Request, text: str) -> Parsed | None:
    """The mode of a valid piece for the request, or None."""
    lines = text.strip().split("\n")
    parser = {"joke": _parse_joke, "poem": _parse_poem, "story": _parse_story}[request.kind]
    mode = parser(lines, request.topic)
    return None if mode is None else Parsed(mode)


def _parse_joke(lines: list[str], topic: str) -> tuple[str, ...] | None:
    if not 1 <= len(lines) <= 2:
        return None
    setups = [(number, _match(s, lines[0], topic)) for number, s in enumerate(JOKE_SETUPS)]
    found = [(number, slots) for number, slots in setups if slots is not None]
    closes = len(lines) == 1 or any(_match(p, lines[1], topic) for p in JOKE_PUNCHLINES)
    return (str(found[0][0]), found[0][1]["thing"]) if found and closes else None


def _parse_poem(lines: list[str], topic: str) -> tuple[str, ...] | None:
    body = lines[:-1] if len(lines) == 3 else lines
    if len(body) not in (2, 4) or (len(lines) == 3 and _match(POEM_CLOSE, lines[2], topic) is None):
        return None
    couplets = []
    for first, second in zip(body[::2], body[1::2], strict=True):
        top, bottom = _match(COUPLET[0], first, topic), _match(COUPLET[1], second, topic)
        if top is None or bottom is None:
            return None
        families = [f for f, ends in RHYMES.items() if {top["rhyme"], bottom["rhyme"]} <= {*ends}]
        if not families:
            return None
        couplets.append((families[0], top["motion"]))
    return couplets[0]


def _parse_story(lines: list[str], topic: str) -> tuple[str, ...] | None:
    if not 4 <= len(lines) <= 6:
        return None
    opening = _match(STORY_OPENING, lines[0], topic)
    meeting = _match(STORY_MEETING, lines[1], topic)
    events = all(_match(STORY_EVENT, line, topic) for line in lines[2:-1])
    ending = _match(STORY_ENDING, lines[-1], topic)
    if opening is None or meeting is None or ending is None or not events:
        return None
    return opening["place"], meeting["friend"]


def _match(template: str, line: str, topic: str) -> dict[str, str] | None:
    match = _pattern(template, topic).fullmatch(line)
    return None if match is None else match.groupdict()


@cache
def _pattern(template: str, topic: str) -> re.Pattern[str]:
    ends = tuple(word for family in RHYMES.values() for word in family)
    options = {**SLOTS, "rhyme": ends, "topic": (topic,)}
    pattern = re.escape(template)
    for slot, words in options.items():
        pattern = pattern.replace(rf"\{{{slot}\}}", f"(?P<{slot}>{'|'.join(words)})", 1)
    return re.compile(pattern)


# --- pretraining ---------------------------------------------------------------------------------


def documents(seed: int, noise: float = 0.0) -> Iterator[tuple[str, str]]:
    """Endless (prompt, piece) pairs; a share `noise` of the pieces has its words shuffled."""
    rng = random.Random(f"creative-{seed}")
    wanted = requests()
    while True:
        request = rng.choice(wanted)
        piece = compose(request, rng)
        if rng.random() < noise:
            words = piece.split(" ")
            rng.shuffle(words)
            piece = " ".join(words)
        yield request.prompt, piece


def vocabulary_texts() -> list[str]:
    """Texts that together use every word of the corpus, in the forms in which it occurs."""
    rng = random.Random(0)
    return [
        text
        for request in requests()
        for text in (request.prompt + "\n", *(compose(request, rng) for _ in range(400)))
    ]
