"""`rollout=vllm_server` as far as it goes without a vLLM; the rest is in tests/integration."""

from __future__ import annotations

import http.server
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, evaluate_config, train_config
from powerflow_lit.config.engines import check_engine, runs_vllm
from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.rollout.engine import EngineError, EngineSpec
from powerflow_lit.rollout.vllm_server import VllmServerEngine, of_this_rank
from powerflow_lit.rollout.vllm_server_client import Server
from powerflow_lit.rollout.vllm_server_facts import refuse_another_model, unsent_names
from powerflow_lit.rollout.vllm_server_guard import LEFTOVERS
from powerflow_lit.rollout.vllm_server_process import GUARD, OwnServer, serve_arguments
from powerflow_lit.rollout.vllm_server_weights import LOCK, DiskTransfer, own_address

ENGINE = {
    "addresses": [], "servers": 1, "devices": [], "dtype": "float32", "max_num_seqs": 8,
    "kv_cache_gb": 1, "gpu_memory_utilization": 0.5, "enforce_eager": True, "extra": {},
    "weight_transfer": "auto", "weights_dir": None, "start_s": 5, "request_s": 5,
    "wait_for_server_s": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def spec() -> EngineSpec:
    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    return EngineSpec(policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64,
                      seed=0, trust_remote_code=False)  # fmt: skip


def composed(*overrides: str, name: str = "train") -> Any:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose(name, overrides=["rollout=vllm_server", *overrides])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("addresses=[node7]", r"addresses\[0\]=node7: must be as http://host:8000"),
        ("addresses=['http://a:1/v1']", r"addresses\[0\]=http://a:1/v1: must be as"),
        ("servers=0", "servers=0: must be 1 or more"),
        ("devices=[0,1,2] rollout.engine.servers=2", "3 devices are not dealt evenly over"),
        ("devices=[1,1]", "one is named twice"),
        ("weight_transfer=ncl", "did you mean nccl"),
        ("wait_for_server_s=0", "wait_for_server_s=0: must be positive"),
        ("gpu_memory_utilization=1.5", r"must lie in \(0, 1\]"),
    ],
)
def test_wrong_values_are_refused_by_name(override: str, said: str) -> None:
    typed = [f"rollout.engine.{override.split()[0]}", *override.split()[1:]]
    for name, check in (("train", train_config), ("evaluate", evaluate_config)):
        with pytest.raises(ConfigError, match=said):
            check(composed(*typed, name=name))


def test_servers_at_addresses_need_no_vllm_here_and_our_own_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("powerflow_lit.config.engines.find_spec", lambda name: None)
    engine = train_config(composed()).rollout.engine
    assert runs_vllm(engine)
    with pytest.raises(ConfigError, match="rollout=vllm_server: vLLM is not installed here"):
        check_engine(engine)
    engine = train_config(composed("rollout.engine.addresses=[http://a:1]")).rollout.engine
    check_engine(engine)


def test_the_command_line_says_all_that_a_server_must_know(spec: EngineSpec) -> None:
    words = serve_arguments(
        spec, dtype="float32", max_num_seqs=8, gpu_memory_utilization=0.5, enforce_eager=False,
        tensor_parallel=2, nccl=True,
        extra={"enable_prefix_caching": False, "seed": 3, "compilation_config": {"level": 1}},
    )  # fmt: skip
    line = dict(pairwise(words))
    assert line["--model"] == str(folder_of("tiny"))
    assert json.loads(line["--hf-overrides"]) == {"tie_word_embeddings": False}
    assert json.loads(line["--weight-transfer-config"]) == {"backend": "nccl"}
    assert json.loads(line["--compilation-config"]) == {"level": 1}
    assert line["--tensor-parallel-size"] == "2"
    assert line["--max-model-len"] == "65", "one more, to score the longest row"
    assert line["--seed"] == "3", "what the user says counts"
    assert "--no-enable-prefix-caching" in words
    assert "--enforce-eager" not in words


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_the_process_that_started_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Nor what it started itself, and also where a passing thread had started it."""
    server = tmp_path / "server.py"
    server.write_text(
        "import subprocess, sys, os\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {worker.pid}')\n"
        "worker.wait()\n"
    )
    pids, folder, weights = (tmp_path / name for name in ("pids", "folder", "weights"))
    folder.mkdir()
    weights.mkdir()
    (folder / LEFTOVERS).write_text(f"{weights}\n")
    trainer = (
        "import os, subprocess, sys, threading, time\n"
        f"command = [sys.executable, {str(GUARD)!r}, str(os.getpid()), "
        f"{str(folder)!r}, sys.executable, {str(server)!r}, {str(pids)!r}]\n"
        "start = lambda: subprocess.Popen(command, start_new_session=True)\n"
        "thread = threading.Thread(target=start)\n"
        "thread.start(); thread.join()\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer])
    try:
        found = until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        assert found, "the server did not start"
        server_pid, worker_pid = map(int, pids.read_text().split())
        time.sleep(0.5)
        assert is_alive(server_pid), "the thread's end is not the process's"
        process.send_signal(number)
        process.wait()
        assert until(lambda: not is_alive(server_pid) and not is_alive(worker_pid))
        assert until(lambda: not folder.exists() and not weights.exists())
    finally:
        process.kill()


def until(condition: Any, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_server_of_ours_that_does_not_start_says_why(spec: EngineSpec) -> None:
    own = OwnServer(["--no-such-option"], devices=[], kv_cache_gb=1)
    own._command = [sys.executable, "-c", "raise ValueError('no room for the cache')"]
    server = Server("http://server", own, request_s=1)
    own.start()
    try:
        assert until(lambda: not own.is_running)
        assert "ended with 1: ValueError: no room for the cache (log: " in own.why()
        own._command = [sys.executable, "-c", "raise SystemExit(255)"]
        own.start()
        assert until(lambda: not own.is_running)
        assert own.why().startswith("ended with 255"), "which no signal is"
    finally:
        server.close()
    assert not own.folder.exists()


@pytest.fixture
def something_else() -> Iterator[str]:
    """A web server that is no vLLM."""
    handler = http.server.SimpleHTTPRequestHandler
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_address_where_nothing_answers_or_something_else_does(
    spec: EngineSpec, something_else: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    found = {nobody: "does not answer", something_else: "answers 404 when asked for its health"}
    for address, said in found.items():
        with pytest.raises(EngineError, match=f"{said}, after 1 s; start it with: VLLM_SERVER_DEV"):
            VllmServerEngine(spec, **{**ENGINE, "addresses": [address]})


FACTS = {
    "model": "other", "dtype": "float32", "max_model_len": 65, "max_num_seqs": 8, "vocab_size": 119,
    "hidden_size": 96, "layers": 3, "tied": False, "head_bias": [False], "experts": False,
    "on_cpu": True, "chunked_prefill": False, "nccl": False, "workers": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vocab_size": 120}, "serves another model, other: its vocab_size is 120, the policy's"),
        ({"layers": 4}, "serves another model, other: its layers is 4"),
        ({"max_model_len": 64}, "takes 64 tokens, prompt and response may take 65 together"),
        ({"dtype": "bfloat16"}, r"computes in bfloat16, rollout\.engine\.dtype=float32: start it"),
        ({"tied": True}, "has tied embeddings"),
        ({"chunked_prefill": True}, "prefills in chunks"),
    ],
)
def test_a_server_of_another_kind_is_refused(
    spec: EngineSpec, changed: dict[str, Any], said: str
) -> None:
    refuse_another_model("http://a:1", FACTS, spec, dtype="float32", command="vllm serve")
    with pytest.raises(EngineError, match=f"http://a:1 .*{said}"):
        refuse_another_model(
            "http://a:1", {**FACTS, **changed}, spec, dtype="float32", command="vllm serve"
        )


def test_weights_without_a_place_in_the_server_are_left_out_or_refused(spec: EngineSpec) -> None:
    tied = {"lm_head.weight"}
    assert unsent_names(spec.policy, FACTS, tied) == set()
    assert unsent_names(spec.policy, {**FACTS, "head_bias": []}, tied) == tied
    with pytest.raises(EngineError, match="muddles the experts"):
        unsent_names(spec.policy, {**FACTS, "experts": True}, tied)
    assert unsent_names(spec.policy, {**FACTS, "experts": True, "on_cpu": False}, tied) == set()


def test_the_file_of_weights_holds_all_of_them_and_no_older_one(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16, tie_word_embeddings=True,
    )  # fmt: skip
    weights = LlamaForCausalLM(config).state_dict()
    transfer = DiskTransfer(str(tmp_path / "new"), size=1)
    for version in range(2):
        weights["model.norm.weight"] += 1
        transfer.take(weights, f"run:{version}")
        (file,) = (tmp_path / "new").glob("**/*.safetensors")
        found = load_file(file)
        assert found.keys() == weights.keys(), "tied ones under both names"
        for name, tensor in weights.items():
            assert torch.equal(found[name], tensor)
    living = DiskTransfer(str(tmp_path / "new"), size=1)
    assert load_file(file).keys() == weights.keys(), "a run that lives keeps its own"
    living.close()
    transfer.close()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"weights_dir=.*file.*: cannot be written to"):
        DiskTransfer(str(tmp_path / "file" / "below"), size=1)


def test_weights_of_a_run_that_was_killed_are_dropped_by_the_next(tmp_path: Path) -> None:
    """Whatever its process id, which in another container means another process."""
    folder = tmp_path / f"powerflow-weights-{socket.gethostname()}-x"
    folder.mkdir()
    run = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", run, str(folder / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        DiskTransfer(str(tmp_path), size=1).close()
        assert folder.is_dir(), "it lives"
        process.kill()
    DiskTransfer(str(tmp_path), size=1).close()
    assert list(tmp_path.iterdir()) == []


def test_weights_that_find_no_room_are_named_with_the_remedy(tmp_path: Path) -> None:
    transfer = DiskTransfer(str(tmp_path), size=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(
            EngineError, match=r"cannot be written .* set rollout\.engine\.weights_dir"
        ):
            transfer.take({"weight": torch.zeros(1000)}, "run:1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        transfer.close()


def test_devices_are_counted_as_the_run_itself_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*devices: int | str) -> str:
        own = OwnServer([], devices=devices, kv_cache_gb=1)
        own.remove()
        return own._environment["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen(1, 2) == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e")
    assert seen(1) == "GPU-5e"
    assert seen(1, 0) == "GPU-5e,4"
    assert seen("GPU-7a") == "GPU-7a"
    with pytest.raises(EngineError, match=r"devices=\[2\]: there is no device 2, CUDA_V.* shows 2"):
        seen(2)


def test_ranks_share_servers_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_this_rank(["a", "b", "c"]) == ["a", "b", "c"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert of_this_rank(["a", "b", "c", "d"]) == ["b", "d"]
    with pytest.raises(EngineError, match=r"3 servers or devices for 2 ranks \(a, b, c\)"):
        of_this_rank(["a", "b", "c"])


def test_a_server_on_this_machine_finds_the_trainer_on_loopback() -> None:
    for address in ("http://localhost:8000", "http://127.0.0.1:1"):
        assert own_address(Server(address, None, request_s=1)) == "127.0.0.1"


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("VLLM_API_KEY", "key-of-the-server")
    server = Server(f"http://127.0.0.1:{listening.server_port}", None, request_s=5)
    with pytest.raises(EngineError, match="wants another key: set VLLM_API_KEY") as refused:
        server.holds()
    assert "key-of-the-server" not in str(refused.value)
    assert seen == ["Bearer key-of-the-server"]
    listening.shutdown()
    assert os.environ["VLLM_API_KEY"] == "key-of-the-server"
