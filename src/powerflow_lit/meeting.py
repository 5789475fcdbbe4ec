"""How the ranks of a run agree on its folder before they have met: the first decides.

Its folder's name holds the time, and it may go on from an older one; the others are told. Those
that Lightning starts from the first rank find it in their environment, those of torchrun and SLURM
in the store over which they are about to meet.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from powerflow_lit.config.processes import TOLD, rank_here
from powerflow_lit.config.rules import ConfigError

WAIT = timedelta(minutes=30)  # for the first rank, which looks at all of a large checkpoint
CALLED_OFF = "called off"
_kept: dict[str, Any] = {"meetings": 0}  # the store lives on: torch's own group meets over it


@dataclass(frozen=True)
class Decision:
    """What the first rank has decided."""

    run_dir: str
    checkpoint: str | None  # that the run goes on from
    ranks: int

    @property
    def folder(self) -> Path:
        return Path(self.run_dir)


def decide(decision: Decision | None) -> None:
    """The first rank's word, before the others can go on; None calls the run off."""
    text = CALLED_OFF if decision is None else json.dumps(asdict(decision))
    if (store := _store()) is not None:
        store.set(_key(), text)
    elif decision is not None:
        os.environ[TOLD] = text


def hear() -> Decision:
    """What the first rank has decided; waits for it.

    Raises:
        ConfigError: the first rank does not begin the run.
    """
    store = _store()
    text = os.environ[TOLD] if store is None else store.get(_key()).decode()
    if text == CALLED_OFF:
        raise ConfigError("rank 0 does not begin the run, and says why")
    return Decision(**json.loads(text))


def over() -> None:
    """A run of this process has ended; it may begin another."""
    if rank_here() == 0:
        os.environ.pop(TOLD, None)
    _kept["meetings"] += 1


def _key() -> str:
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"powerflow_lit/{restart}/{_kept['meetings']}"


def _store() -> dist.TCPStore | None:
    """The store of torchrun's or SLURM's processes; None where Lightning starts them, or nobody."""
    if TOLD in os.environ:
        return None
    environment: TorchElasticEnvironment | SLURMEnvironment
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and SLURMEnvironment.detect():
        environment = SLURMEnvironment()
    else:
        return None
    if "store" not in _kept:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _kept["store"] = dist.TCPStore(
            environment.main_address,
            environment.main_port,
            is_master=environment.global_rank() == 0 and not by_agent,
            timeout=WAIT,
            wait_for_workers=False,
            multi_tenant=True,  # torch opens it once more
        )
    return _kept["store"]  # type: ignore[no-any-return]
