"""How a policy's weights reach the servers: through a folder that both see, or through NCCL."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from powerflow_lit.rollout.engine import EngineError, LostWeightsError
from powerflow_lit.rollout.host_state import trainer_state_kept
from powerflow_lit.rollout.vllm_server_client import Server, ServerDownError
from powerflow_lit.rollout.vllm_server_worker import WEIGHTS

CLOSE_S = 10.0  # for the end of an update that has failed
MEMORY = Path("/dev/shm")  # a file system in memory
LOCK = "lock"  # held by the run whose folder it is


class Transfer(Protocol):
    """Brings the weights of the last `take` to any server."""

    takes_turns: bool  # one server after the other, from the thread of the trainer

    def take(self, weights: Mapping[str, Tensor], label: str) -> None:
        """Weights to give from now on, by their names in the hub's files, and what they go by."""
        ...

    def give(self, server: Server) -> None:
        """Replace a server's weights; it generates nothing meanwhile.

        Raises:
            ServerDownError: it is gone.
            EngineError: it cannot take them.
            LostWeightsError: they are not kept here, so only a sync can bring them.
        """
        ...

    def forget(self, server: Server) -> None:
        """The server was started anew."""
        ...

    def release(self) -> None:
        """The trainer's weights change from now on."""
        ...

    def close(self) -> None: ...


def _replaced(server: Server, label: str, replace: Callable[[], Any]) -> None:
    """`replace()` between a pause and a resumption, then the new label."""
    server.label = None
    server.post("/pause?mode=abort")  # what a trainer left behind that was killed ends here
    try:
        replace()
        server.post("/update_weight_version", {"new_version": label})
        server.post("/reset_prefix_cache")  # its keys and values are the old weights'
    finally:
        server.post("/resume")
    server.label = label


class DiskTransfer:
    """A file in a folder that servers and trainer see.

    Args:
        folder: null for one in memory, if it has the room, which only this machine sees.
        size: of all weights, bytes.
    """

    takes_turns = False

    def __init__(self, folder: str | None, *, size: int) -> None:
        self._shared = folder is not None
        parent = Path(folder).absolute() if folder is not None else roomy_folder(2 * size)
        prefix = f"powerflow-weights-{socket.gethostname()}-"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _drop_leftovers(parent, prefix)
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = _locked(self.folder)
        except OSError as error:
            raise EngineError(
                f"rollout.engine.weights_dir={folder}: cannot be written to ({error.strerror})"
            ) from error
        self._label = ""

    def take(self, weights: Mapping[str, Tensor], label: str) -> None:
        own: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, tensor in weights.items():
            held = tensor.detach().contiguous()
            # the file cannot hold one tensor under two names
            own[name] = held.clone() if held.data_ptr() in places else held
            places.add(held.data_ptr())
        for old in self.folder.iterdir():
            if old.is_dir():  # weights that nobody reads any more
                shutil.rmtree(old, ignore_errors=True)
        place = self._place(label)
        try:
            place.mkdir()
            save_file(own, place / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the policy's weights cannot be written to {place} ({error}): set "
                "rollout.engine.weights_dir to a folder with room for them"
            ) from error
        if self._shared:  # servers of other users read it
            for path in (self.folder, place, place / WEIGHTS):
                path.chmod(0o755)
        self._label = label

    def give(self, server: Server) -> None:
        folder = str(self._place(self._label))
        if not all(sees for (sees,) in map(_first_list, server.rpc("policy_sees", folder=folder))):
            raise EngineError(
                f"{server.name} does not see {folder}: set rollout.engine.weights_dir to a folder "
                "that trainer and servers share, under the same name"
            )
        _replaced(server, self._label, lambda: server.rpc("policy_reload", folder=folder))

    def forget(self, server: Server) -> None:
        """Nothing: a server reads the file whenever it is told to."""

    def release(self) -> None:
        """Nothing: the file stays as it is."""

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _place(self, label: str) -> Path:
        return self.folder / label.replace(":", "-")


def roomy_folder(size: int) -> Path:
    """In memory where that has room for so many bytes, else where temporary files are."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= size
    return MEMORY if roomy else Path(tempfile.gettempdir())


def _locked(folder: Path) -> int | None:
    """A file of the folder that is locked for as long as this process lives, as it is open."""
    made = folder / f"{LOCK}.new"
    lock = os.open(made, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):  # a file system without locks: then nobody drops the folder
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(folder / LOCK)  # under this name it was never unlocked
        return lock
    os.close(lock)
    return None


def _drop_leftovers(parent: Path, prefix: str) -> None:
    """Weights of runs of this machine that were killed.

    By their locks, not by process ids: those of another container mean nothing here.
    """
    for old in parent.glob(f"{prefix}*"):
        with suppress(OSError), (old / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)


def _first_list(value: Any) -> list[bool]:
    return value if isinstance(value, list) else [False]


class NcclTransfer:
    """vLLM's own weight-transfer engine, from this GPU to those of the servers.

    Each server has a group of its own with the trainer, so that one that dies takes no other with
    it. Weights are not kept: what a server loses while the trainer goes on comes with the next
    sync.
    """

    takes_turns = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: dict[str, str] = {}  # the label of each server's weights
        self._source: Any = _Source()  # vLLM's own base class would have to be imported
        self._engines: dict[str, Any] = {}
        self._label = ""

    def take(self, weights: Mapping[str, Tensor], label: str) -> None:
        self._source.weights, self._label = weights, label

    def give(self, server: Server) -> None:
        if self._source.weights is None:
            raise LostWeightsError(f"{server.name} was started anew and has no weights")
        with torch.cuda.device(self._device), trainer_state_kept():
            if server.holds() != self._given.get(server.name):  # also one that was started anew
                self.forget(server)
            if server.name not in self._engines:
                self._connect(server)
            _replaced(server, self._label, lambda: self._send(server))
            self._given[server.name] = self._label

    def _send(self, server: Server) -> None:
        sent = False
        try:
            self._engines[server.name].send_weights()
            sent = True
        finally:
            if not sent:  # the group is of no use any more, and the update is still open
                self.forget(server)
                with suppress(EngineError, ServerDownError):
                    server.post("/finish_weight_update", timeout_s=CLOSE_S)

    def forget(self, server: Server) -> None:
        if (old := self._engines.pop(server.name, None)) is not None:
            old.shutdown()

    def release(self) -> None:
        self._source.weights = None

    def close(self) -> None:
        for engine in self._engines.values():
            engine.shutdown()
        self._engines.clear()

    def _connect(self, server: Server) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = own_address(server)
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        workers = int(server.facts["workers"])
        info = NCCLTrainerInitInfo(address, port, 1 + workers, rank=0, packed=True)
        self._engines[server.name] = WeightTransferTrainerFactory.trainer_init(
            info, client=_Control(server), source=self._source
        )


class _Source:
    """The weights as vLLM's engine wants to be given them."""

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] | None = None

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self._items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._items())

    def _items(self) -> list[tuple[str, Tensor]]:
        assert self.weights is not None
        return list(self.weights.items())


class _Control:
    """The calls beside the weights themselves, over the server's own connection."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._server.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = None if weight_version is None else {"weight_version": weight_version}
        self._server.post("/finish_weight_update", body)


def own_address(server: Server) -> str:
    """The address of this machine that a server can reach."""
    host = None if server.process is not None else urlsplit(server.address).hostname
    if host is None or host in ("localhost", "127.0.0.1", "::1"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((host, 9))  # sends nothing: it only chooses a way
        return str(route.getsockname()[0])
