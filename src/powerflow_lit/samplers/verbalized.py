"""VS-Standard: the model is asked for several responses at once, with their probabilities.

Verbalized Sampling (arXiv 2510.01171); the wording of the request is ours and stands in `conf/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import Route, decode, encode_prompts
from powerflow_lit.samplers.base import Draws, EvaluationSettings, Policy, Progress
from powerflow_lit.samplers.decoding import Decoding
from powerflow_lit.tasks.base import Response, Sampled
from powerflow_lit.types import Prompt


@dataclass(frozen=True)
class VerbalizedSampling:
    """N samples of a prompt from N/k calls, each of which asks for k responses as JSON.

    Responses that cannot be read are missing from the draws and counted, never made up:
    `vs_parse_failures` is the share of the responses asked for that a prompt lacks.

    Args:
        k: responses asked for in one call.
        instruction: put before the prompt; `{k}` stands for the number.
        temperature, top_p: of the calls.
        tokens_per_call: limit of one call, for its k responses together.

    Raises:
        ValueError: k or tokens_per_call under 1, or an instruction without `{k}`.
    """

    scores: ClassVar[bool] = False
    k: int
    instruction: str
    temperature: float
    top_p: float
    tokens_per_call: int

    def __post_init__(self) -> None:
        if self.k < 1 or self.tokens_per_call < 1:
            raise ValueError(f"k={self.k}, tokens_per_call={self.tokens_per_call}: 1 or more each")
        if "{k}" not in self.instruction:
            raise ValueError("the instruction of verbalized sampling must name {k}")

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
        on_progress: Progress | None,
    ) -> Draws:
        wanted = settings.samples_per_prompt
        calls = -(-wanted // self.k)
        asked = self._asked(policy.tokenizer, policy.route, prompts)

        def report(done: int, tokens: int) -> None:
            if on_progress is not None:
                on_progress(done, len(prompts) * calls, tokens)

        groups = Decoding(self.temperature, top_p=self.top_p).completions(
            policy.engine,
            asked,
            EvaluationSettings(calls, self.tokens_per_call, settings.seed),
            report,
        )
        samples, figures, failed, missing = [], [], 0, 0
        for prompt, group in zip(prompts, groups, strict=True):
            found = [verbalized(decode(policy.tokenizer, c.token_ids))[: self.k] for c in group]
            texts = [text for call in found for text in call][:wanted]
            failed += sum(not call for call in found)
            missing += wanted - len(texts)
            samples.append(Sampled(prompt, tuple(_response(policy.tokenizer, t) for t in texts)))
            figures.append({"vs_parse_failures": (wanted - len(texts)) / wanted})
        notes = []
        if missing:
            total = len(prompts) * wanted
            notes.append(
                f"{failed} of {len(prompts) * calls} calls could not be read as JSON with texts; "
                f"{missing} of {total} responses are missing: @k figures count them as wrong, "
                "figures of text leave them out"
            )
        tokens = sum(len(c.token_ids) for group in groups for c in group)
        return Draws(samples, wanted, tokens, figures, tuple(notes))

    def tokens_needed(
        self,
        tokenizer: Tokenizer,
        route: Route,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
    ) -> int:
        return max(map(len, self._asked(tokenizer, route, prompts))) + self.tokens_per_call

    def _asked(
        self, tokenizer: Tokenizer, route: Route, prompts: Sequence[Prompt]
    ) -> list[tuple[int, ...]]:
        """Token ids of the prompts with the request before them."""
        request = self.instruction.replace("{k}", str(self.k)).strip()
        asked = [replace(p, text=f"{request}\n\n{p.text}") for p in prompts]
        ids = encode_prompts(tokenizer, asked, route)
        return [ids[p.id] for p in prompts]


def verbalized(answer: str) -> list[str]:
    """Texts of the JSON objects in an answer that have a "text", in order; none if there are none.

    Code fences, words before and after, an object around the list and a list that was cut off
    are all borne; single quotes are no JSON. Objects without a non-empty "text" do not count.
    """
    return [text for value in _json_values(answer) for text in _texts(value)]


def _json_values(answer: str) -> Iterator[Any]:
    """All JSON lists and objects in a text, outermost where they are whole."""
    decoder = json.JSONDecoder(strict=False)  # models write line breaks into strings
    at = 0
    while (starts := [i for i in (answer.find("[", at), answer.find("{", at)) if i >= 0]) != []:
        at = min(starts)
        try:
            value, at = decoder.raw_decode(answer, at)
        except ValueError:
            at += 1
        except RecursionError:  # thousands of opening brackets
            return
        else:
            yield value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        text = value.get("text")
        if isinstance(text, str):
            if text.strip():
                yield text.strip()
        else:
            for part in value.values():
                yield from _texts(part)


def _response(tokenizer: Tokenizer, text: str) -> Response:
    return Response(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), False)
