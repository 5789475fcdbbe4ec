"""Runs on a disk that fills up: the checkpoint stands, one line says so, and the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.runs import QUICK, end_of, left_of, start

pytestmark = pytest.mark.faults

RUN = (*QUICK, "rollout=hf", "run_dir=run")
# a process in which no file may grow beyond so many bytes
LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[0] = "train.py"
from powerflow_lit.train import main
main()
"""


def finished(folder: Path, *overrides: str) -> str:
    code, output = end_of(start(folder, *overrides), within=300)
    assert code == 0, output
    return output


def refused(folder: Path, *overrides: str) -> str:
    """The one line of a run whose disk is full."""
    process = start(folder, *overrides)
    code, output = end_of(process, within=300)
    assert left_of(process) == ""
    return the_line(code, output)


def the_line(code: int, output: str) -> str:
    assert code == 2, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def limited(folder: Path, limit: int, *overrides: str) -> str:
    """The same of a run whose files must not grow beyond `limit` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *overrides],
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return the_line(done.returncode, done.stdout)


def summary(folder: Path) -> dict[str, str]:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_a_checkpoint_without_room_leaves_the_one_before_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    finished(tmp_path, *RUN, "refills=1")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    last.with_name("last.ckpt.tmp").symlink_to("/dev/full")
    line = refused(tmp_path, "resume=run", "refills=2")
    assert "run/checkpoints/last.ckpt: No space left on device" in line
    assert "stands as it was" in line
    assert "python -m powerflow_lit.train resume=run" in line
    assert last.read_bytes() == before
    assert summary(tmp_path)["status"] == "failed"
    assert "error: " + summary(tmp_path)["error"] == line
    finished(tmp_path, "resume=run", "refills=2")
    assert summary(tmp_path)["status"] == "finished"
    assert torch.load(last, weights_only=True)["epoch"] == 1


def test_an_export_without_room_loses_no_trained_policy(tmp_path: Path) -> None:
    """The checkpoint is there when the disk fills up: it evaluates, and is exported later."""
    finished(tmp_path, *RUN, "refills=1", "callbacks.export=false")
    run = tmp_path / "run"
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    line = limited(tmp_path, 1_000_000, "resume=run", "callbacks.export=true")
    assert "run/export: File too large" in line
    assert "checkpoints/last.ckpt stands" in line
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list(run.glob("export*"))
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    evaluated = subprocess.run(
        [sys.executable, "-m", "powerflow_lit.evaluate", "run=run", "rollout=hf",
         "samples_per_prompt=1", "decodings=[{temperature: 1, min_p: 0}]", "output=eval",
         "task.build.eval_size=8"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["status"] == "finished"
    finished(tmp_path, "resume=run", "callbacks.export=true")
    assert (run / "export" / "model.safetensors").exists()


LONG = (
    "callbacks.checkpoint.every_n_refills=100", "callbacks.evaluation.every_n_refills=100",
    "callbacks.evaluation.max_prompts=2", "callbacks.selfcheck.every_n_refills=100",
)  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "file", "overrides"),
    [
        (1000, "config.yaml", ()),
        (7000, "metrics.csv", ("callbacks.samples.per_refill=0", "refills=20")),
        (7000, "samples.jsonl", ("callbacks.samples.per_refill=16", "refills=8")),
        (1_000_000, "checkpoints/last.ckpt", ("refills=1",)),
    ],
)
def test_a_file_that_must_not_grow_is_named(
    tmp_path: Path, limit: int, file: str, overrides: tuple[str, ...]
) -> None:
    line = limited(tmp_path, limit, *RUN, *LONG, *overrides)
    assert f"run/{file}: File too large" in line
    if file != "config.yaml":
        assert "error: " + summary(tmp_path)["error"] == line
        assert "There is no checkpoint yet" in line
