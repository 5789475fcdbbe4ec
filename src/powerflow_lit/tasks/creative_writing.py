"""`task=creative_writing`: poems, stories and jokes for prompts of your own or the shipped ones."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Literal, get_args

from powerflow_lit.tasks.base import Sampled, Task, TaskError
from powerflow_lit.tasks.rows import READERS
from powerflow_lit.tasks.sources import Source, read_items
from powerflow_lit.types import Prompt

Wrap = Literal["auto", "always", "never"]
SHIPPED = Path(__file__).parent / "prompts"
# figures that are also given for each genre alone
BY_GENRE = ("diversity_semantic", "diversity_lexical", "length_mean")
# a line that asks for something, in which its genre is then looked for
REQUEST = re.compile(
    r"(please |(can|could|would) you )?(write|tell|make|give|compose|create|share|continue)\b",
    re.IGNORECASE,
)


class CreativeWriting(Task):
    """Prompts by genre, split into training and evaluation; what is written has no right answer.

    A list has one prompt a line. A whole request ("Please write a poem ...") is taken as it
    stands; any other line (an opening line, a theme) is set into its genre's template. The split
    is the same for every run seed, and depends on the set of lines but not on their order.

    Args:
        prompts: a file for each genre: text, or a data set with a question column. None is the
            shipped list.
        skip: genres to leave out.
        templates: for each genre, with `{line}` and, where a length may be asked for, `{length}`.
        length: what `{length}` becomes, e.g. " of about {words} words".
        words: in `length`; None asks for no length.
        wrap: whether lines go into the template: those that are no request yet (`auto`), all, none.
        train_share: in (0, 1), of each genre's prompts as of all.
        split_seed: of the split.

    Raises:
        TaskError: a file is missing or empty, or a setting cannot work.
    """

    name = "creative_writing"

    def __init__(
        self,
        *,
        prompts: Mapping[str, str | None],
        skip: Sequence[str],
        templates: Mapping[str, str],
        length: str,
        words: int | None,
        wrap: Wrap,
        train_share: float,
        split_seed: int,
    ) -> None:
        self.headline = "diversity_semantic"
        for genre in skip:
            if genre not in prompts:
                raise TaskError(f"task.build.skip: no genre '{genre}', only {', '.join(prompts)}")
        prompts = {genre: path for genre, path in prompts.items() if genre not in skip}
        _check(prompts, templates, wrap, train_share)
        asked = "" if words is None else length.replace("{words}", str(words))
        seen: set[str] = set()
        texts: dict[str, list[str]] = {}
        self.notes = []
        for genre, path in prompts.items():
            lines = read_lines(
                path or str(SHIPPED / f"{genre}.txt"), name=f"task.build.prompts.{genre}"
            )
            whole = [
                line if _stands_alone(line, genre, wrap)
                else templates[genre].replace("{length}", asked).replace("{line}", line)
                for line in lines
            ]  # fmt: skip
            texts[genre] = []
            for text in whole:
                key = " ".join(text.lower().split())
                if key not in seen:
                    seen.add(key)
                    texts[genre].append(text)
            repeated = len(whole) - len(texts[genre])
            if repeated:
                self.notes.append(f"{path or genre}: repeated prompts left out: {repeated}")
        train, held_out = stratified_split(texts, train_share, split_seed)
        if not train or not held_out:
            raise TaskError(
                f"{len(seen)} prompts in all leave {len(train)} to train and {len(held_out)} to "
                f"evaluate with train_share={train_share}: give more prompts"
            )
        self._all_genres = list(texts)
        self._genres = [genre for genre, _ in [*train, *held_out]]
        every = [Prompt(i, text) for i, (_, text) in enumerate([*train, *held_out])]
        self._train, self._eval = every[: len(train)], every[len(train) :]

    def train_prompts(self) -> Sequence[Prompt]:
        return self._train

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._eval

    def genre(self, prompt: Prompt) -> str:
        """The list that a prompt of this task is from."""
        return self._genres[prompt.id]

    def score(self, sample: Sampled) -> dict[str, float]:
        figures = self.text_metrics(sample)
        genre = self.genre(sample.prompt)
        return {
            self.headline: figures[self.headline],
            **figures,
            **{
                f"{name}/{other}": figures[name] if other == genre else nan
                for other in self._all_genres
                for name in BY_GENRE
            },
        }


def read_lines(path: str, *, name: str) -> list[str]:
    """Lines of a text file without blank ones, or the questions of a data file.

    Raises:
        TaskError: no such file, not text, or nothing in it; `name` is the setting's.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix.lower() in READERS:
            source = Source(path, "train", None, None, None, None)
            return [item.question for item in read_items(source).items]
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except TaskError as error:
        raise TaskError(f"{name}: {error}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{name}={path}: not a text file in UTF-8") from error
    except OSError as error:
        raise TaskError(
            f"{name}={path}: cannot be read ({error.strerror}): give a text file with one prompt "
            "a line, or null for the shipped prompts"
        ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise TaskError(f"{name}={path}: holds no prompts, one is wanted a line")
    return lines


def stratified_split(
    texts: Mapping[str, Sequence[str]], share: float, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(genre, text) pairs of the two parts: `share` of the whole first, each genre as near to it.

    The rest of rounding each genre down goes to the genres that lost most by it.
    """
    total = sum(len(lines) for lines in texts.values())
    counts = {genre: int(share * len(lines)) for genre, lines in texts.items()}
    lost = sorted(texts, key=lambda genre: counts[genre] - share * len(texts[genre]))
    for genre in lost[: round(share * total) - sum(counts.values())]:
        counts[genre] += 1
    train, held_out = [], []
    for genre, lines in texts.items():
        order = sorted(lines)
        random.Random(f"{seed}-{genre}").shuffle(order)
        train += [(genre, text) for text in order[: counts[genre]]]
        held_out += [(genre, text) for text in order[counts[genre] :]]
    return train, held_out


def _check(
    prompts: Mapping[str, str | None], templates: Mapping[str, str], wrap: str, share: float
) -> None:
    shipped = sorted(file.stem for file in SHIPPED.glob("*.txt"))
    if not prompts:
        raise TaskError("task.build.prompts has no genre left: give a file for one at least")
    for genre, path in prompts.items():
        if path is None and genre not in shipped:
            raise TaskError(
                f"task.build.prompts.{genre} is null, but prompts are shipped for "
                f"{', '.join(shipped)} only: give a file"
            )
        if "{line}" not in templates.get(genre, ""):
            raise TaskError(
                f"task.build.templates.{genre} is missing or has no {{line}} in it, where the "
                "prompt's line goes"
            )
    if wrap not in get_args(Wrap):
        raise TaskError(f"task.build.wrap={wrap}: choose one of {', '.join(get_args(Wrap))}")
    if not 0 < share < 1:
        raise TaskError(f"task.build.train_share={share}: must lie in (0, 1); the paper's is 0.6")


def _stands_alone(line: str, genre: str, wrap: str) -> bool:
    if wrap != "auto":
        return wrap == "never"
    return REQUEST.match(line) is not None and genre in line.lower()
