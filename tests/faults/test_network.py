"""Runs without a network, a key or a login: what needs none of them never asks for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import QUICK, end_of, left_of, start

pytestmark = pytest.mark.faults

# imported by every Python process of a run: only this machine can be reached, and who tries to
# reach another is written down
NO_NETWORK = """
import errno, os, socket

def refuse(address):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{address}\\n")
    raise OSError(errno.ENETUNREACH, "Network is unreachable")

def local(address):
    return not isinstance(address, tuple) or str(address[0]) in ("localhost", "127.0.0.1", "::1")

class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if local(address) else refuse(address)

    def connect_ex(self, address):
        return super().connect_ex(address) if local(address) else refuse(address)

resolve = socket.getaddrinfo

def getaddrinfo(host, *rest, **options):
    names = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname())
    return resolve(host, *rest, **options) if host in names else refuse(host)

socket.socket, socket.getaddrinfo = Socket, getaddrinfo
"""


@pytest.fixture
def cut_off(tmp_path: Path) -> dict[str, str]:
    """The environment of a process without a network, without logins and not told of either."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    source = str(Path(__file__).parents[2] / "src")
    return {
        "PYTHONPATH": f"{tmp_path / 'site'}:{source}",
        "ATTEMPTS": str(tmp_path / "attempts"),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
    }


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_run_needs_no_network(tmp_path: Path, cut_off: dict[str, str], engine: str) -> None:
    process = start(
        tmp_path, *QUICK, "logger=wandb", f"rollout={engine}", "refills=2", "run_dir=run",
        env=cut_off,
    )  # fmt: skip
    code, output = end_of(process, within=300)
    assert code == 0, output
    assert "W&B offline (no key or login: upload later" in output
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert left_of(process) == ""
    attempts = tmp_path / "attempts"
    assert not attempts.exists(), attempts.read_text()


def test_the_network_of_these_tests_is_cut(tmp_path: Path, cut_off: dict[str, str]) -> None:
    """A model of the hub cannot be had, which one line says at once."""
    process = start(
        tmp_path, "model=hf", "model.path=Qwen/Qwen2.5-0.5B", "logger=none", env=cut_off
    )
    code, output = end_of(process, within=120)
    assert code == 2, output
    assert "error: model.path=Qwen/Qwen2.5-0.5B" in output
    assert "huggingface.co" in (tmp_path / "attempts").read_text()


@pytest.mark.parametrize(
    ("mode", "env"),
    [("online", {}), ("auto", {"WANDB_MODE": "online"})],
)
def test_an_online_run_without_a_login_is_refused_before_a_model_loads(
    tmp_path: Path, mode: str, env: dict[str, str]
) -> None:
    process = start(tmp_path, f"logger.mode={mode}", "run_dir=run", env=env)
    code, output = end_of(process, within=60)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "WANDB_API_KEY" in line
    assert "logger.mode=offline" in line
    assert not (tmp_path / "run" / "config.yaml").exists()
