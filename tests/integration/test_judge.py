"""Judges of conf/judge against a real `vllm serve` of the embedded instruct model."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from powerflow_lit.config import conf_dir
from powerflow_lit.judging.assessors import Assessor
from powerflow_lit.tasks.base import Response, Sampled
from powerflow_lit.types import Prompt
from tests.vllm_server import VllmServer, embedded_with_characters, vllm_serve

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("judge")
    model = embedded_with_characters("tiny_instruct", folder)
    with vllm_serve(
        model, model="tiny-judge", max_model_len=2048, log=folder / "log", timeout_s=240
    ) as serving:
        yield serving


def judge(kind: str, server: VllmServer, cache: Path, *overrides: str) -> Assessor:
    changes = [
        f"judge={kind}", f"judge.client.base_url={server.base_url}",
        f"judge.client.model={server.model}", f"judge.client.cache={cache}", *overrides,
    ]  # fmt: skip
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return instantiate(compose("evaluate", overrides=changes).judge)


def sampled(number: int, prompt: str, *texts: str) -> Sampled:
    return Sampled(Prompt(number, prompt), tuple(Response(t, (1,), False) for t in texts))


PIECES = [
    sampled(0, "Write a poem about the sea.", "The sea sings.", "O brave sea!", "The sea sings."),
    sampled(1, "Write a short story about a fox.", "One morning a fox went to market."),
    sampled(2, "Write a short joke about a cat.", "Why did the cat wait? It was shy."),
]


@pytest.mark.slow
def test_free_replies_of_a_poor_judge_are_failures_and_are_asked_for_once(
    server: VllmServer, tmp_path: Path
) -> None:
    before = server.chat_requests()
    creative = judge("creative", server, tmp_path / "c", "judge.client.max_tokens=48")
    figures = creative.assess(PIECES, None)
    assert figures == [{"judge_failures": 1.0}] * 3  # no quality made up of nothing
    record = creative.record() or {}
    assert (record["requests"], record["cached"], record["failures"]) == (4, 1, 5)
    assert server.chat_requests() - before == 4
    replies = [json.loads(line)["reply"] for line in (tmp_path / "c").read_text().splitlines()]
    assert len(replies) == 4
    assert all(len(reply.split()) > 3 for reply in replies)  # the model did say something

    again = judge("creative", server, tmp_path / "c", "judge.client.max_tokens=48")
    assert again.assess(PIECES, None) == figures
    record = again.record() or {}
    assert (record["requests"], record["cached"], record["failures"]) == (0, 5, 5)
    assert server.chat_requests() - before == 4


def test_held_to_the_schema_even_a_poor_judge_gives_scores_within_range(
    server: VllmServer, tmp_path: Path
) -> None:
    held = ("judge.response_format=json_schema", "judge.client.max_tokens=400")
    creative = judge("creative", server, tmp_path / "c", *held)
    figures = creative.assess(PIECES, None)
    assert all(f["judge_failures"] == 0 for f in figures)
    assert all(0 <= f["quality"] <= 1 for f in figures)
    replies = [json.loads(line)["reply"] for line in (tmp_path / "c").read_text().splitlines()]
    joke = next(scores for reply in replies if "funniness" in (scores := json.loads(reply)))
    weights = {"funniness": 0.40, "cleverness": 0.25, "originality": 0.20, "structure": 0.15}
    assert figures[2]["quality"] == pytest.approx(sum(w * joke[n] for n, w in weights.items()) / 5)

    strategies = judge("strategies", server, tmp_path / "s", *held)
    problem = sampled(3, "What is 2 + 3 ?", *(f"2 + 3 = {i}" for i in range(16)))
    (figure,) = strategies.assess([problem], None)
    assert figure["judge_failures"] == 0
    assert figure["strategy_diversity"] in (1, 2, 3, 4, 5)
    assert (strategies.record() or {})["requests"] == 1


def test_a_piece_too_long_for_the_judge_is_a_failure_and_the_others_are_judged(
    server: VllmServer, tmp_path: Path
) -> None:
    creative = judge(
        "creative", server, tmp_path / "c", "judge.response_format=json_schema",
        "judge.client.max_tokens=400",
    )  # fmt: skip
    (figures,) = creative.assess([sampled(0, "A joke.", "a fox " * 1900, "The fox sang.")], None)
    assert figures["judge_failures"] == 0.5
    assert 0.2 <= figures["quality"] <= 1


MANY = [sampled(i, "Write a joke.", f"Why did the fox sing {i} ?") for i in range(24)]
SHORT = ("judge.client.concurrency=1", "judge.client.max_tokens=128")
RUN = """
import sys
from pathlib import Path
from tests.integration.test_judge import MANY, SHORT, VllmServer, judge
server = VllmServer(sys.argv[1], sys.argv[2])
judge("creative", server, Path(sys.argv[3]), *SHORT).assess(MANY, None)
"""


@pytest.mark.faults
def test_a_judge_killed_half_way_asks_only_the_rest(server: VllmServer, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, server.root, server.model, str(cache)],
        cwd=Path(__file__).parents[2], stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 90
        while not (cache.exists() and cache.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    answered = cache.read_bytes().count(b"\n")
    assert 3 <= answered < len(MANY)
    time.sleep(1)  # the server drops what the dead one had under way
    before = server.chat_requests()
    resumed = judge("creative", server, cache, *SHORT)
    assert len(resumed.assess(MANY, None)) == len(MANY)
    record: dict[str, Any] = resumed.record() or {}
    assert (record["requests"], record["cached"]) == (len(MANY) - answered, answered)
    assert server.chat_requests() - before == len(MANY) - answered


def test_a_model_that_the_server_has_not_is_named_beside_those_it_has(
    server: VllmServer, tmp_path: Path
) -> None:
    from powerflow_lit.errors import USER_ERRORS, root_cause  # heavy: it imports all rooms

    with pytest.raises(USER_ERRORS) as error:
        judge("creative", server, tmp_path / "c", "judge.client.model=large-judge")
    assert str(root_cause(error.value)) == (
        f"{server.base_url} has no model 'large-judge'; it has: tiny-judge"
    )
