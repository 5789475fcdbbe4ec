"""`--help` of every command: at once, with nothing imported that only a run needs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

COMMANDS = ("train", "evaluate", "report", "dashboard", "pretrain", "prepare_data", "doctor")
HEAVY = {
    "torch", "lightning", "transformers", "vllm", "datasets", "wandb", "matplotlib", "peft",
    "math_verify", "pandas", "scipy", "sklearn", "sympy", "pyarrow",
}  # fmt: skip
CPU_SECONDS = 3.0  # twice what is promised, for a machine that does other things too


@dataclass(frozen=True)
class Help:
    """What `python -m powerflow_lit.<command> --help` printed, imported and took, CPU seconds."""

    code: int
    out: str
    modules: frozenset[str]
    cpu_s: float


@cache
def help_of(command: str) -> Help:
    """One process a command, whatever is asked of it."""
    read, write = os.pipe()
    code = (
        "import atexit, os, runpy, sys\n"
        f"atexit.register(lambda: os.write({write}, ' '.join(sys.modules).encode()))\n"
        f"sys.argv = ['{command}', '--help']\n"
        f"runpy.run_module('powerflow_lit.{command}', run_name='__main__', alter_sys=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=[write], text=True
    )
    os.close(write)
    with os.fdopen(read) as names:
        out = process.stdout.read() if process.stdout else ""
        modules = frozenset(name.partition(".")[0] for name in names.read().split())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Help(process.returncode, out, modules, usage.ru_utime + usage.ru_stime)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    asked = help_of(command)
    assert asked.code == 0
    assert "powerflow_lit" in asked.modules, "the names of the modules were read"
    assert not asked.modules & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_little_cpu_time(command: str) -> None:
    assert help_of(command).cpu_s < CPU_SECONDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_can_be_set(command: str) -> None:
    if command == "doctor":
        assert "--deep" in help_of(command).out
        return
    shown = help_of(command).out
    assert "== Config ==" in shown
    assert "strategy: dr_grpo, empo, flowrl" in shown  # a group of conf/ and its choices
    assert "experiment/calibrate: qwen2.5_1.5b," in shown  # one below another


def test_every_installed_command_is_looked_at() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entries = {entry.partition(":")[0] for entry in project["scripts"].values()}
    assert entries == {f"powerflow_lit.{command}" for command in COMMANDS}
