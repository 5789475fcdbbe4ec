"""Questions to a chat model behind a server: cached, resumable, several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from powerflow_lit.judging.cache import AnswerCache, key_of
from powerflow_lit.judging.endpoint import Endpoint, JudgeError, RefusedError

Progress = Callable[[int, int], None]  # answers so far, answers in all


@dataclass(frozen=True)
class Question:
    """One user turn, and the form that the reply is held to (None: free)."""

    text: str
    response_format: Mapping[str, Any] | None


@dataclass(frozen=True)
class Reply:
    """What came of one question; `text` is empty where the server refused it."""

    text: str
    refusal: str | None = None  # why, in the server's words


class ChatClient:
    """One chat model, always decoded alike.

    Args:
        base_url, model, api_key_env, timeout_s, max_retries, concurrency, probe: see `Endpoint`.
        temperature: 0 for figures that can be had again; None leaves it to the server.
        max_tokens: of a reply; None leaves it to the server.
        seed: sent along where the server takes one; None sends none.
        extra: further fields of each request, part of the cache's key
            (`{chat_template_kwargs: {enable_thinking: false}}`).
        cache: jsonl file of the answers; None keeps them for this process only.

    Attributes:
        requests: questions that the server answered or refused.
        cached: questions answered from the cache, doubles of one call included.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None,
        temperature: float | None,
        max_tokens: int | None,
        seed: int | None,
        timeout_s: float,
        max_retries: int,
        concurrency: int,
        extra: Mapping[str, Any],
        cache: str | None,
        probe: bool,
    ) -> None:
        self.model = model
        self.requests = self.cached = 0
        self._cache = AnswerCache(cache)
        self._endpoint = Endpoint(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            max_retries=max_retries,
            concurrency=concurrency,
            probe=probe,
        )
        chosen = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        self._parameters = {k: v for k, v in chosen.items() if v is not None}
        self._extra = dict(extra)
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question], on_progress: Progress | None) -> list[Reply]:
        """A reply to each question, in order; only what the cache lacks is asked.

        Raises:
            JudgeError: the server fails for good, or refuses every question.
        """
        requests = [self._request(question) for question in questions]
        keys = [key_of(request) for request in requests]
        missing = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if self._cache.get(key) is None
        }
        known = len(keys) - len(missing)
        self.cached += known

        def progress(done: int) -> None:
            if on_progress is not None:
                on_progress(known + done, len(keys))

        progress(0)
        answered = self._endpoint.map(self._answer, list(missing.items()), progress)
        refused = {key: reply for key, reply in answered if reply.refusal is not None}
        if refused and len(refused) == len(set(keys)):
            reason = next(iter(refused.values())).refusal
            raise JudgeError(f"the judge refuses every question: {reason}")
        return [refused.get(key) or self._reply(key) for key in keys]

    def _request(self, question: Question) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.text}],
            **self._parameters,
        }
        if question.response_format is not None:
            request["response_format"] = dict(question.response_format)
        return request | ({"extra_body": self._extra} if self._extra else {})

    def _answer(self, item: tuple[str, Mapping[str, Any]]) -> tuple[str, Reply]:
        key, request = item
        try:
            with self._endpoint.errors():
                answer = self._endpoint.client.chat.completions.create(**request)
        except RefusedError as error:
            self._count()
            return key, Reply("", str(error))
        self._count()
        if not answer.choices:
            return key, Reply("", f"{self._endpoint.base_url} sends no choices")
        choice = answer.choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
        self._cache.put(key, {"model": self.model, "reply": text, "finish_reason": finish})
        return key, Reply(text)

    def _count(self) -> None:
        with self._lock:
            self.requests += 1

    def _reply(self, key: str) -> Reply:
        answer = self._cache.get(key)
        assert answer is not None
        return Reply(str(answer["reply"]))

    def close(self) -> None:
        """Lets the server go; safe to call twice."""
        self._endpoint.close()
