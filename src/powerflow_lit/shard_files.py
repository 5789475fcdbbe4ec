"""The files of a checkpoint whose weights are spread over ranks, beside the one that names them.

`last.ckpt` holds all but weights and optimizer states, and the name of a folder in which each rank
has written its own part, `shards-<id>/rank-00000.pt`. The folder is whole on the disk before
`last.ckpt` is renamed into place, and is never written to again: that one rename is what makes the
new checkpoint the run's, as it is without shards.

Not `torch.distributed.checkpoint`: the metadata of its folders are a pickle, whose loading runs
whatever code it holds. These are read with `weights_only=True`, and carry a checksum each.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

PREFIX = "shards-"


def shard_folder(checkpoint: Path, state: Mapping[str, Any]) -> Path | None:
    """Where the parts of a checkpoint lie; None where it is in one file."""
    shards = state.get("shards")
    return None if shards is None else checkpoint.parent / str(shards["folder"])


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def what_is_missing(checkpoint: Path, state: Mapping[str, Any]) -> str | None:
    """Why a checkpoint cannot be read, by the sizes of its parts; None where all are there."""
    folder = shard_folder(checkpoint, state)
    if folder is None:
        return None
    for rank, size in enumerate(state["shards"]["bytes"]):
        file = file_of(folder, rank)
        if not file.exists():
            return f"{file} is missing"
        if (found := file.stat().st_size) != size:
            return f"{file} has {found} bytes and had {size}"
    return None


def read_part(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank has written. Nothing in it is ever run.

    Raises:
        ValueError: it was altered; other errors where it is cut short or missing.
    """
    file = file_of(folder, rank)
    with ZipFile(file) as parts:
        altered = parts.testzip()  # torch does not look at its checksums
    if altered is not None:
        raise ValueError(f"{file} is damaged: {altered} in it was altered")
    part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if (part["folder"], part["rank"]) != (folder.name, rank):
        raise ValueError(f"{file} is of another checkpoint ({part['folder']}, {part['rank']})")
    return part  # type: ignore[no-any-return]


def whole_weights(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The module's weights as if they had never been spread; `state` is `checkpoint`'s content."""
    folder = shard_folder(checkpoint, state)
    if folder is None:
        return dict(state["state_dict"])
    parts = [read_part(folder, rank) for rank in range(len(state["shards"]["bytes"]))]
    spread = set(parts[0]["spread"])
    return {
        name: torch.cat([part["state_dict"][name] for part in parts]) if name in spread else value
        for name, value in parts[0]["state_dict"].items()
    }


def remove_unused(folder: Path) -> None:
    """Remove the parts in a folder of checkpoints that none of these names any more.

    Nothing, where one of these cannot be read: it might name any.
    """
    found = list(folder.glob(f"{PREFIX}*"))
    if not found:
        return
    used = set()
    for checkpoint in folder.glob("*.ckpt"):
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # damage comes as an error of zip, pickle or torch
            return
        used.add(shard_folder(checkpoint, state))
    for parts in found:
        if parts not in used:
            shutil.rmtree(parts, ignore_errors=True)
