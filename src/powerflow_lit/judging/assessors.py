"""Assessors: figures of a prompt's responses that a language model gives.

`assess` returns figures per prompt, which are merged into the task's own.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from powerflow_lit.judging.client import ChatClient, Progress, Question
from powerflow_lit.judging.endpoint import JudgeError
from powerflow_lit.judging.rubrics import Rubric, cut, genre_of
from powerflow_lit.tasks.base import Sampled
from powerflow_lit.types import Prompt

FORMATS = (None, "json_schema")


@dataclass(frozen=True)
class JudgeRecord:
    """What `eval.json` says of a judge. Figures compare only where name, model and rubric agree."""

    name: str
    model: str
    rubric: str  # first 16 hex digits of the sha256 of all rubrics and bounds
    requests: int  # asked of the server
    cached: int  # answered without asking
    failures: int  # replies without scores, refused questions included


class Assessor(ABC):
    """A judge of a prompt's responses.

    Attributes:
        name: as in `judge=`.
        model: the judging model; None where nothing is judged.
    """

    name: str
    model: str | None

    @abstractmethod
    def assess(
        self, samples: Sequence[Sampled], on_progress: Progress | None
    ) -> list[dict[str, float]]:
        """Figures of each prompt, in order; a prompt that could not be judged lacks the figure.

        Args:
            samples: prompts with their responses.
            on_progress: hears (answers so far, answers in all), cached ones included.

        Raises:
            JudgeError: the server fails for good; what it answered is in the cache.
        """

    @abstractmethod
    def record(self) -> dict[str, Any] | None:
        """What was done so far, for `eval.json`; None where nothing is judged."""

    def close(self) -> None:
        """Lets the server go; safe to call twice."""
        return None


class NoJudge(Assessor):
    """`judge=none`: no figures."""

    name = "none"
    model = None

    def assess(
        self, samples: Sequence[Sampled], on_progress: Progress | None
    ) -> list[dict[str, float]]:
        return [{} for _ in samples]

    def record(self) -> dict[str, Any] | None:
        return None


class ChatJudge(Assessor):
    """What the judges behind a chat model share: asking, reading, counting.

    Args:
        name: as in `judge=`.
        client: the judging model.
        rubrics: by kind of question.
        response_format: `json_schema` makes the server write valid scores and nothing else (no
            thinking aloud before them); None leaves the reply free.
        max_chars: longest response shown to the judge; the rest is cut off, with a note.
    """

    def __init__(
        self,
        name: str,
        client: ChatClient,
        rubrics: Mapping[str, Mapping[str, Any]],
        response_format: str | None,
        max_chars: int,
    ) -> None:
        if response_format not in FORMATS:
            raise JudgeError(f"response_format={response_format}: must be null or json_schema")
        if max_chars < 1:
            raise JudgeError(f"max_chars={max_chars}: must be 1 or more")
        self.name, self.client, self.model = name, client, client.model
        self.rubrics = {kind: Rubric.of(node) for kind, node in rubrics.items()}
        self.response_format, self.max_chars = response_format, max_chars
        self.failures = 0

    def scores(
        self, asked: Sequence[tuple[str, Mapping[str, str]]], on_progress: Progress | None
    ) -> list[dict[str, float] | None]:
        """Scores of each (kind of rubric, material); None where the reply holds none."""
        rubrics = [self.rubrics[kind] for kind, _ in asked]
        questions = [
            Question(
                rubric.question({k: cut(v, self.max_chars) for k, v in material.items()}),
                rubric.schema() if self.response_format == "json_schema" else None,
            )
            for rubric, (_, material) in zip(rubrics, asked, strict=True)
        ]
        replies = self.client.ask(questions, on_progress)
        scores = [rubric.read(reply.text) for rubric, reply in zip(rubrics, replies, strict=True)]
        self.failures += sum(s is None for s in scores)
        return scores

    def record(self) -> dict[str, Any] | None:
        content = {kind: asdict(rubric) for kind, rubric in self.rubrics.items()}
        rubric = json.dumps([content, self.max_chars, self.response_format], sort_keys=True)
        digest = hashlib.sha256(rubric.encode()).hexdigest()[:16]
        client = self.client
        return asdict(
            JudgeRecord(
                self.name, client.model, digest, client.requests, client.cached, self.failures
            )
        )

    def close(self) -> None:
        self.client.close()


class CreativeJudge(ChatJudge):
    """Quality of poems, stories and jokes: one question a response, `quality` in 0..1.

    Args:
        name, client, response_format, max_chars: see `ChatJudge`.
        rubrics: by genre.

    Attributes:
        genre_of: a prompt's genre; set another on the instance where the text does not tell.
    """

    def __init__(
        self,
        *,
        name: str,
        client: ChatClient,
        rubrics: Mapping[str, Mapping[str, Any]],
        response_format: str | None,
        max_chars: int,
    ) -> None:
        super().__init__(name, client, rubrics, response_format, max_chars)
        self.genre_of: Callable[[Prompt], str] = lambda prompt: genre_of(prompt.text)

    def assess(
        self, samples: Sequence[Sampled], on_progress: Progress | None
    ) -> list[dict[str, float]]:
        """`quality`, the mean over the responses with scores; `judge_failures`, the others' share.

        `quality/<genre>` is the same figure again, for means over one genre's prompts.
        An empty response is worth what the judge says of it, as any other.
        """
        genres = [self._genre(sample.prompt) for sample in samples]
        asked = [
            (genre, {"request": sample.prompt.text, "piece": response.text})
            for genre, sample in zip(genres, samples, strict=True)
            for response in sample.responses
        ]
        scores = iter(self.scores(asked, on_progress))
        figures = []
        for genre, sample in zip(genres, samples, strict=True):
            own = [next(scores) for _ in sample.responses]
            values = [self.rubrics[genre].quality(s) for s in own if s is not None]
            figures.append(_figures(("quality", f"quality/{genre}"), values, len(own)))
        return figures

    def _genre(self, prompt: Prompt) -> str:
        genre = self.genre_of(prompt)
        if genre not in self.rubrics:
            raise JudgeError(
                f"judge={self.name} has no rubric for the genre {genre!r} of prompt {prompt.id}; "
                f"it has: {', '.join(self.rubrics)}"
            )
        return genre


class StrategyJudge(ChatJudge):
    """How many distinct ways of solving a problem its responses show: one question a problem.

    Args:
        name, client, response_format, max_chars: see `ChatJudge`.
        rubric: one criterion, whose score is the figure `strategy_diversity`.
        samples: responses shown, the first so many; a prompt with fewer shows what it has, and
            one with fewer than two is not judged.
    """

    def __init__(
        self,
        *,
        name: str,
        client: ChatClient,
        rubric: Mapping[str, Any],
        response_format: str | None,
        max_chars: int,
        samples: int,
    ) -> None:
        super().__init__(name, client, {"strategies": rubric}, response_format, max_chars)
        if samples < 2:
            raise JudgeError(f"judge={name}: samples={samples}: needs 2 or more")
        self.samples = samples

    def assess(
        self, samples: Sequence[Sampled], on_progress: Progress | None
    ) -> list[dict[str, float]]:
        """`strategy_diversity` in the rubric's range; `judge_failures` 1 where it has no score."""
        asked = [
            ("strategies", self._material(sample)) for sample in samples if _comparable(sample)
        ]
        scores = iter(self.scores(asked, on_progress))
        figures: list[dict[str, float]] = []
        for sample in samples:
            if not _comparable(sample):
                figures.append({})
                continue
            own = next(scores)
            values = [] if own is None else [self.rubrics["strategies"].weighted(own)]
            figures.append(_figures(("strategy_diversity",), values, 1))
        return figures

    def _material(self, sample: Sampled) -> dict[str, str]:
        shown = sample.responses[: self.samples]
        solutions = {f"solution_{i}": r.text for i, r in enumerate(shown, start=1)}
        return {"problem": sample.prompt.text} | solutions


def _comparable(sample: Sampled) -> bool:
    return len(sample.responses) > 1


def _figures(names: Sequence[str], values: Sequence[float], asked: int) -> dict[str, float]:
    """The mean of the values there are, and the share of questions that brought none."""
    figures = {"judge_failures": 1 - len(values) / asked} if asked else {}
    return figures | (dict.fromkeys(names, sum(values) / len(values)) if values else {})
