"""Asking a judge: cache, resumption, retries, refusals, and what a user is told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from powerflow_lit.judging.cache import AnswerCache
from powerflow_lit.judging.client import ChatClient, Question
from powerflow_lit.judging.endpoint import JudgeError
from tests.chat_server import Server, chat_server


def client(server: Server | str, cache: Path | None = None, **changes: Any) -> ChatClient:
    settings: dict[str, Any] = {
        "base_url": server if isinstance(server, str) else server.base_url,
        "model": "judge-1", "api_key_env": None, "temperature": 0.0, "max_tokens": 50,
        "seed": None, "timeout_s": 10.0, "max_retries": 2, "concurrency": 4, "extra": {},
        "cache": None if cache is None else str(cache), "probe": True,
    }  # fmt: skip
    return ChatClient(**settings | changes)


def ask(judge: ChatClient, *texts: str) -> list[str]:
    return [reply.text for reply in judge.ask([Question(t, None) for t in texts], None)]


def echo(body: dict[str, Any]) -> tuple[int, str]:
    return 200, "re: " + body["messages"][-1]["content"]


def test_replies_come_in_the_order_of_the_questions_and_report_progress() -> None:
    def slow_first(body: dict[str, Any]) -> tuple[int, str]:
        time.sleep(0.2 if body["messages"][0]["content"] == "q0" else 0)
        return echo(body)

    heard: list[tuple[int, int]] = []
    with chat_server(slow_first) as server:
        judge = client(server)
        questions = [Question(f"q{i}", None) for i in range(6)]
        replies = judge.ask(questions, lambda done, total: heard.append((done, total)))
    assert [r.text for r in replies] == [f"re: q{i}" for i in range(6)]
    assert heard == [(i, 6) for i in range(7)]


def test_a_request_carries_the_sampling_parameters_and_nothing_that_is_left_to_the_server() -> None:
    with chat_server(echo) as server:
        ask(client(server, seed=7, extra={"chat_template_kwargs": {"enable_thinking": False}}), "a")
        ask(client(server, temperature=None, max_tokens=None), "a")
    assert server.bodies[0] == {
        "model": "judge-1", "messages": [{"role": "user", "content": "a"}], "temperature": 0.0,
        "max_tokens": 50, "seed": 7, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert server.bodies[1].keys() == {"model", "messages"}


def test_what_was_answered_is_never_asked_again(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "answers.jsonl"
    with chat_server(echo) as server:
        first = client(server, cache)
        assert ask(first, "a", "b", "a") == ["re: a", "re: b", "re: a"]
        assert (first.requests, first.cached) == (2, 1)  # a double within a call is asked once
        second = client(server, cache)
        assert ask(second, "b", "c", "a") == ["re: b", "re: c", "re: a"]
        assert (second.requests, second.cached) == (1, 2)
    assert sorted(server.questions) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.5}, {"max_tokens": 51}, {"seed": 1}, {"extra": {"top_p": 0.9}}]
)
def test_other_sampling_parameters_are_another_question(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with chat_server(echo) as server:
        ask(client(server, tmp_path / "c"), "a")
        ask(client(server, tmp_path / "c", **changes), "a")
    assert len(server.bodies) == 2


def test_the_cache_outlives_its_server(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        ask(client(server, tmp_path / "c"), "a")
    assert ask(client(server, tmp_path / "c", probe=False), "a") == ["re: a"]


def test_a_torn_last_line_is_passed_over_and_the_next_answer_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    cache = AnswerCache(path)
    cache.put("one", {"reply": "1"})
    cache.put("two", {"reply": "2"})
    path.write_bytes(path.read_bytes()[:-7])
    torn = AnswerCache(path)
    assert torn.get("one") == {"reply": "1"}
    assert torn.get("two") is None
    torn.put("three", {"reply": "3"})
    again = AnswerCache(path)
    assert len(again) == 2
    assert again.get("three") == {"reply": "3"}


RUN = """
import sys
from powerflow_lit.judging.client import ChatClient, Question
judge = ChatClient(base_url=sys.argv[1], model="judge-1", api_key_env=None, temperature=0.0,
                   max_tokens=50, seed=None, timeout_s=10.0, max_retries=2, concurrency=1,
                   extra={}, cache=sys.argv[2], probe=True)
judge.ask([Question(f"q{i}", None) for i in range(12)], None)
"""


def test_a_killed_run_asks_only_the_rest(tmp_path: Path) -> None:
    halfway, going_on = threading.Event(), threading.Event()

    def stall_at_six(body: dict[str, Any]) -> tuple[int, str]:
        if body["messages"][0]["content"] == "q6" and not going_on.is_set():
            halfway.set()
            going_on.wait(30)
        return echo(body)

    cache = tmp_path / "c"
    with chat_server(stall_at_six) as server:
        command = [sys.executable, "-c", RUN, server.base_url, str(cache)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            assert halfway.wait(60), process.communicate(timeout=5)[1]
        finally:
            process.kill()
            process.communicate()
        going_on.set()
        server.bodies.clear()
        resumed = client(server, cache)
        texts = ask(resumed, *(f"q{i}" for i in range(12)))
    assert texts == [f"re: q{i}" for i in range(12)]
    assert sorted(server.questions) == sorted(f"q{i}" for i in range(6, 12))
    assert (resumed.requests, resumed.cached) == (6, 6)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_failing_server_is_asked_again(status: int) -> None:
    attempts: list[int] = []

    def once_busy(body: dict[str, Any]) -> tuple[int, str]:
        attempts.append(1)
        return (status, "busy") if len(attempts) == 1 else echo(body)

    with chat_server(once_busy) as server:
        judge = client(server)
        assert ask(judge, "a") == ["re: a"]
    assert len(attempts) == 2
    assert judge.requests == 1


def test_a_server_that_keeps_failing_ends_the_run_and_what_it_answered_is_kept(
    tmp_path: Path,
) -> None:
    def fails_at_b(body: dict[str, Any]) -> tuple[int, str]:
        return (429, "quota used up") if body["messages"][0]["content"] == "b" else echo(body)

    with chat_server(fails_at_b) as server:
        judge = client(server, tmp_path / "c", concurrency=1)
        questions = [Question(text, None) for text in "abc"]
        with pytest.raises(JudgeError, match=r"answers 429: quota used up .*kept"):
            judge.ask(questions, lambda done, total: time.sleep(done))  # b fails meanwhile
    assert "c" not in server.questions
    assert len((tmp_path / "c").read_text().splitlines()) == 1


def test_a_refused_question_has_no_reply_and_is_not_cached(tmp_path: Path) -> None:
    def too_long(body: dict[str, Any]) -> tuple[int, str]:
        long = len(body["messages"][0]["content"]) > 10
        return (400, "maximum context length is 10") if long else echo(body)

    with chat_server(too_long) as server:
        judge = client(server, tmp_path / "c")
        replies = judge.ask([Question("a", None), Question("b" * 20, None)], None)
        assert replies[0].refusal is None
        assert "maximum context length" in (replies[1].refusal or "")
        assert len((tmp_path / "c").read_text().splitlines()) == 1
        with pytest.raises(JudgeError, match=r"refuses every question: .*maximum context"):
            ask(judge, "c" * 20, "d" * 20)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_in_flight_than_allowed(concurrency: int) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, str]:
        time.sleep(0.05)
        return echo(body)

    with chat_server(slow) as server:
        ask(client(server, concurrency=concurrency), *(f"q{i}" for i in range(9)))
    assert server.most_in_flight == concurrency


def test_an_absent_server_is_named_in_one_line() -> None:
    with chat_server(echo) as server:
        gone = server.base_url
    with pytest.raises(JudgeError, match=f"no server answers at {gone} .*vllm serve") as error:
        client(gone)
    assert "\n" not in str(error.value)


def test_a_wrong_model_name_lists_what_the_server_has() -> None:
    with (
        chat_server(echo, models=("qwen", "llama")) as server,
        pytest.raises(JudgeError, match="no model 'judge-1'; it has: qwen, llama"),
    ):
        client(server)


def test_the_key_is_read_from_the_named_variable_and_stands_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tells_key(body: dict[str, Any]) -> tuple[int, str]:
        if body["messages"][0]["content"] == "bad":
            return 401, "wrong key sk-very-secret"
        return (400, "no: sk-very-secret") if body["messages"][0]["content"] == "b" else echo(body)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-default")
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with chat_server(tells_key) as server:
        judge = client(server, tmp_path / "c", api_key_env="MY_KEY")
        ask(judge, "a")
        with pytest.raises(JudgeError) as refused:
            ask(judge, "b")
        with pytest.raises(JudgeError, match="refuses access: mend the key in MY_KEY") as denied:
            ask(judge, "bad")
        ask(client(server), "a")
    assert set(server.keys[:-1]) == {"Bearer sk-very-secret"}
    assert server.keys[-1] == "Bearer none"  # a local server is never shown another's key
    for text in (str(refused.value), str(denied.value), (tmp_path / "c").read_text()):
        assert "secret" not in text


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(JudgeError, match=r"api_key_env=NO_SUCH_KEY: .*api_key_env=null"):
        client("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"pip install 'powerflow-lit\[judge\]'"):
        client("http://127.0.0.1:1/v1")


def test_an_answer_is_in_the_file_as_soon_as_it_is_there(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c")
    cache.put("k", {"reply": "ä\n\u2028ü"})
    assert json.loads((tmp_path / "c").read_text()) == {"key": "k", "reply": "ä\n\u2028ü"}
    assert AnswerCache(tmp_path / "c").get("k") == {"reply": "ä\n\u2028ü"}
