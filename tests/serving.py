"""Real `vllm serve` processes on loopback that a run is told the addresses of."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
from transformers import PreTrainedModel

from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.vllm_server_process import SERVE, serve_arguments
from tests.vllm_server import _end_with_parent


def tiny(max_model_len: int = 64) -> EngineSpec:
    policy: PreTrainedModel = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    return EngineSpec(policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,),
                      max_model_len=max_model_len, seed=0, trust_remote_code=False)  # fmt: skip


class Serving:
    """A server on a port of its own, started as docs/engines.md says."""

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        arguments = serve_arguments(
            spec, dtype="float32", max_num_seqs=64, gpu_memory_utilization=0.2, enforce_eager=True,
            tensor_parallel=1, nccl=False, extra={},
        )  # fmt: skip
        self._command = [*SERVE, *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Serving:
        env = {
            **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",  # as the trainer of the tiny model
        }  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=env, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        return self

    def wait(self, seconds: float = 240) -> Serving:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/health").is_success:
                    return self
            time.sleep(0.2)
        raise AssertionError(self._log.read_text(errors="replace")[-4000:])

    def label(self) -> str:
        """Of the weights that it holds."""
        return str(httpx.get(f"{self.address}/weight_info").json()["weight_version"])

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """As the kernel does, without a word."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
