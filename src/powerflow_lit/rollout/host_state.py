"""What an engine in the trainer's process does to that process, undone."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


@cache
def kernel_threads() -> int:
    """Threads of vLLM's kernels on the CPU: those that torch had when vLLM was first used.

    vLLM 0.32 never asks again; with another number its decoding is wrong, by half a nat a token.
    """
    return torch.get_num_threads()


@contextmanager
def trainer_state_kept() -> Iterator[None]:
    """Undo what vLLM does to its host process: random state, threads, environment, excepthook.

    Building the engine reseeds torch, numpy and random, and even seeded requests consume the
    global torch generator; on the CPU `torch.set_num_threads` is replaced by a no-op. Of the
    environment only vLLM's own settings stay, `VLLM_...`, which it reads as it works.

    In a thread beside the trainer's, which may only sample and score, that is torch's random state
    alone: the rest is the trainer's to change meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        with _random_state_kept():
            yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    environment, excepthook = dict(os.environ), sys.excepthook
    if not torch.cuda.is_available() and kernel_threads() != threads:
        torch.set_num_threads(kernel_threads())
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update(environment)
        sys.excepthook = excepthook


@contextmanager
def _random_state_kept() -> Iterator[None]:
    # a new thread would run vLLM's kernels with as many threads as there are cores
    torch.set_num_threads(kernel_threads())
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def group_kept(group: Any) -> Iterator[None]:
    """Let the trainer's default process group outlive vLLM's shutdown, which destroys it.

    Args:
        group: the default group from before the engine; None if there was none, and then the
            one that vLLM made goes with it.
    """
    destroy = dist.destroy_process_group

    def destroy_others(which: Any = None) -> None:
        if which is not None and which is not group:
            destroy(which)

    if group is not None:
        dist.destroy_process_group = destroy_others  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def classes_kept(policy: nn.Module, engine_model: Callable[[Callable], Any]) -> Iterator[None]:
    """Undo what building an engine does to the classes of the policy's modules.

    Of an architecture without code of its own (GPT-NeoX), vLLM runs the class of `transformers`
    and rewrites it in place for compilation: models of the trainer would fail in their next
    forward pass. The rewriting moves to a subclass, which only the engine's model has.

    Args:
        engine_model: `engine_model(f)` calls `f` with the model that was built.
    """
    before = {cls: (cls.__bases__, dict(vars(cls))) for cls in {type(m) for m in policy.modules()}}
    try:
        yield
    finally:
        for cls, (bases, names) in before.items():
            changed = {k: v for k, v in vars(cls).items() if names.get(k) is not v}
            if not changed:
                continue
            added = [base for base in cls.__bases__ if base not in bases]
            rewritten = type(cls.__name__, (cls, *added), changed)
            engine_model(partial(_move_to_subclass, cls, rewritten))
            cls.__bases__ = bases
            for name in changed:
                if name in names:
                    setattr(cls, name, names[name])
                else:
                    delattr(cls, name)


def _move_to_subclass(cls: type, subclass: type, model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is cls:
            module.__class__ = subclass
