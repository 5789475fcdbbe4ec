"""Servers that are lost and found, as `rollout=vllm_server` sees them.

At the other end speaks a web server that says and forgets what a `vllm serve` would; real ones are
in tests/faults.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout import vllm_server_client, vllm_server_pool
from powerflow_lit.rollout.engine import EngineError, EngineSpec, LostWeightsError
from powerflow_lit.rollout.vllm_server import VllmServerEngine
from powerflow_lit.types import Sampling

PROMPTS = [[10 + i, 11, 12] for i in range(6)]
SAMPLING = Sampling(1, 4, seed=3)


class Speaking:
    """A server at an address that can end, come back without weights, or fall silent."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {
            "model": "tiny", "dtype": "float32", "max_model_len": 65, "max_num_seqs": 8,
            "vocab_size": 119, "hidden_size": 96, "layers": 3, "tied": False,
            "head_bias": [False], "experts": False, "on_cpu": True, "chunked_prefill": False,
            "nccl": False, "workers": 1,
        }  # fmt: skip
        self.version, self.answers_as = "default", None  # type: str, str | None
        self.asked: list[str] = []
        self.is_silent = False
        self._released = threading.Event()
        self._port = 0
        self.start()
        self.address = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        speaking = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"weight_version": speaking.version})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else {}
                self._answer(speaking.said(self.path, body))

            def _answer(self, said: dict[str, Any]) -> None:
                if speaking.is_silent:
                    speaking._released.wait(30)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *_: Any) -> None: ...

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._http.daemon_threads = True
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def said(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body.get("method", path))
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            truth: dict[str, Any] = {"policy_facts": self.facts, "policy_reload": []}
            return {"results": [truth.get(body["method"], [True])]}
        if path.endswith("/generate"):
            spans = [{"version": self.answers_as or self.version}]
            return {
                "choices": [
                    {
                        "index": 0,
                        "token_ids": [body["token_ids"][0], 2],
                        "logprobs": None,
                        "finish_reason": "stop",
                        "weight_versions": spans,
                    }
                ]
            }
        return {}

    def end(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.version = "default"

    def close(self) -> None:
        self._released.set()
        self.end()


@pytest.fixture(scope="module")
def spec() -> EngineSpec:
    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    return EngineSpec(policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64,
                      seed=0, trust_remote_code=False)  # fmt: skip


@pytest.fixture
def two() -> Iterator[tuple[Speaking, Speaking]]:
    servers = Speaking(), Speaking()
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def engine_on(spec: EngineSpec, folder: str, *servers: Speaking, **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "addresses": [server.address for server in servers], "servers": 1, "devices": [],
        "dtype": "float32", "max_num_seqs": 8, "kv_cache_gb": 1, "gpu_memory_utilization": 0.5,
        "enforce_eager": True, "extra": {}, "weight_transfer": "disk", "weights_dir": folder,
        "start_s": 5, "request_s": 20, "wait_for_server_s": 10,
    }  # fmt: skip
    engine = VllmServerEngine(spec, **{**settings, **changed})
    engine.sync(policy_weights(spec.policy), 1)
    return engine


def assert_answered(engine: Any) -> None:
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [group[0].token_ids for group in groups] == [(prompt[0], 2) for prompt in PROMPTS]


def test_a_server_that_was_restarted_between_two_syncs_is_looked_at_again(
    spec: EngineSpec, folder: str, two: tuple[Speaking, Speaking]
) -> None:
    server = two[0]
    engine = engine_on(spec, folder, server)
    server.end()
    server.start()
    server.asked.clear()
    engine.sync(policy_weights(spec.policy), 2)
    assert server.asked.index("policy_facts") < server.asked.index("policy_reload")
    assert_answered(engine)
    server.end()
    server.facts["tied"] = True
    server.start()
    with pytest.raises(EngineError, match="has tied embeddings"):
        engine.sync(policy_weights(spec.policy), 3)
    engine.close()


def test_a_server_that_another_run_uses_is_given_up(
    spec: EngineSpec, folder: str, two: tuple[Speaking, Speaking]
) -> None:
    engine = engine_on(spec, folder, two[0])
    two[0].answers_as = "another:7"
    said = f"{two[0].address} was lost 4 times in a row .*weights another:7.* does another use it"
    with pytest.raises(EngineError, match=said):
        engine.generate(PROMPTS, SAMPLING)
    engine.close()


def test_broken_off_while_its_server_is_away_an_engine_wants_its_weights_again(
    spec: EngineSpec, folder: str, two: tuple[Speaking, Speaking]
) -> None:
    engine = engine_on(spec, folder, two[0])
    two[0].end()
    begun = time.monotonic()

    def stop(done: int, tokens: int) -> None:
        if time.monotonic() - begun > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, SAMPLING, stop)
    two[0].start()
    assert engine.policy_version == -1
    with pytest.raises(LostWeightsError):
        engine.generate(PROMPTS, SAMPLING)
    engine.sync(policy_weights(spec.policy), 1)
    assert_answered(engine)
    engine.close()


@pytest.mark.parametrize(("request_s", "watch_s"), [(20, 0.05), (1, 10)])
def test_the_others_answer_what_a_machine_had_that_vanished(
    spec: EngineSpec, folder: str, two: tuple[Speaking, Speaking], request_s: int, watch_s: float,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Noticed amid a request or at the end of its time, whichever comes first."""
    engine = engine_on(spec, folder, *two, request_s=request_s)
    engine._pool._wait_s = 1
    monkeypatch.setattr(vllm_server_pool, "WATCH_S", watch_s)
    monkeypatch.setattr(vllm_server_client, "PROBE_S", 0.5)
    two[0].is_silent = True
    begun = time.monotonic()
    assert_answered(engine)
    assert time.monotonic() - begun < 12
    assert f"warning: {two[0].address} is waited for, up to 1 s" in capsys.readouterr().out
    engine.close()


def test_of_servers_that_are_all_gone_the_first_to_be_back_is_enough(
    spec: EngineSpec, folder: str, two: tuple[Speaking, Speaking],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine = engine_on(spec, folder, *two)
    for server in two:
        server.end()
    back = threading.Timer(1, two[1].start)
    back.start()
    begun = time.monotonic()
    engine.sync(policy_weights(spec.policy), 2)
    assert time.monotonic() - begun < 8, "the first is not waited for"
    assert f"{two[0].address} is left out until the next refill" in capsys.readouterr().out
    assert_answered(engine)
    two[1].end()
    engine._pool._wait_s = 1
    lost = "; ".join(f"{s.address} is lost: does not answer, after 1 s" for s in two)
    with pytest.raises(EngineError, match=lost):
        engine.sync(policy_weights(spec.policy), 3)
    for server in two:
        server.start()
    engine.close()
