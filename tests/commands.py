"""The entry points in processes of their own, without the seconds that each import of torch costs.

A server has imported the package once; each command is a fork of it, with its own folder,
environment, arguments, output and exit code. Whatever a command does to its process dies with it.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["powerflow_lit.training", "powerflow_lit.train", "powerflow_lit.evaluate", "wandb"]
)
# vLLM looks at every class of model in a process of its own, and keeps there what it found
VLLM_CACHE = os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm"))


def environment(home: Path) -> dict[str, str]:
    """That of these tests without any W&B login."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return {**kept, "HOME": str(home), "VLLM_CACHE_ROOT": VLLM_CACHE}


def command(
    module: str, arguments: Sequence[str], *, folder: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """`python -m <module> <arguments>` from `folder`: its exit code and all of its output."""
    with tempfile.TemporaryDirectory() as kept:
        files = [Path(kept) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(
            target=_run,
            args=(module, list(arguments), str(folder), dict(env), list(map(str, files))),
        )
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        output, errors = (file.read_text() if file.exists() else "" for file in files)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(arguments), process.exitcode, output, errors)


def _run(
    module: str, arguments: list[str], folder: str, env: dict[str, str], files: list[str]
) -> None:
    # what the server registered for its own end (W&B's folder of media) is not ours to clear away
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    for number, file in enumerate(files, start=1):
        place = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(place, number)
        os.close(place)
    # the same streams, since W&B listens to those that it found
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [f"{module}.py", *arguments]
    code = 0
    try:
        importlib.import_module(module).main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
