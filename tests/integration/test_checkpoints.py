"""Checkpoints that are damaged, foreign or of another run are named; the one before is used."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.models.loading import local_folder
from powerflow_lit.resume import CheckpointError, checkpoint_of, read_checkpoint
from powerflow_lit.training import run

SMALL = (
    "debug=fast", "rollout=hf", "logger=none", "callbacks.export=false",
    "callbacks.evaluation.max_prompts=2", "callbacks.evaluation.samples_per_prompt=1",
)  # fmt: skip


def trained(folder: Path, *overrides: str) -> dict[str, object]:
    typed = [*SMALL, f"run_dir={folder}", *overrides]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = train_config(compose("train", overrides=typed))
    return run(config, folder, typed)


@pytest.fixture(scope="module")
def two_refills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two"
    trained(folder)
    return folder


@pytest.fixture
def folder(two_refills: Path, tmp_path: Path) -> Path:
    """A copy of a run of two refills, whose previous.ckpt is of the first."""
    return shutil.copytree(two_refills, tmp_path / "run")


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def test_the_checkpoint_before_is_kept_beside_the_last(folder: Path) -> None:
    names = ("previous.ckpt", "last.ckpt")
    found = [read_checkpoint(last(folder).with_name(name))["run"] for name in names]
    assert [state["refills"] for state in found] == [1, 2]
    assert sorted(p.name for p in last(folder).parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor, where nothing but a checksum can see it."""
    with zipfile.ZipFile(path) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def replace_by_another_programs(path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 3}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged"),
        (empty, "is damaged"),
        (flip_a_bit, "was altered"),
        (replace_by_another_programs, "no checkpoint of powerflow_lit"),
    ],
)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(
    folder: Path,
    damage: object,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(damage)
    damage(last(folder))
    point = checkpoint_of(folder)
    warned = capsys.readouterr().err
    assert point is not None
    assert (point.path.name, point.refills) == ("previous.ckpt", 1)
    assert f"warning: {last(folder)}" in warned
    assert message in warned
    assert warned.count("\n") == 1


def test_a_run_whose_last_checkpoint_is_damaged_ends_as_if_it_were_not(
    folder: Path, two_refills: Path
) -> None:
    truncate(last(folder))
    trained(folder, f"resume={folder}")
    expected, found = (read_checkpoint(last(f))["state_dict"] for f in (two_refills, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert last(folder).with_name("last.ckpt.damaged").exists(), "kept, but never taken for good"


def test_with_no_good_checkpoint_each_is_named_and_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "metrics.csv").read_bytes()
    for name in ("last", "previous"):
        truncate(last(folder).with_name(f"{name}.ckpt"))
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged.*previous.ckpt is damaged"):
        trained(folder, f"resume={folder}")
    assert (folder / "metrics.csv").read_bytes() == before


class Payload:
    """What a hostile file would have pickle do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    state = torch.load(last(folder), weights_only=True)
    for name in ("last", "previous"):
        torch.save({**state, "extra": Payload(marker)}, last(folder).with_name(f"{name}.ckpt"))
    with pytest.raises(
        CheckpointError, match=r"holds code, (posix|os)\.system, which is never run"
    ):
        trained(folder, f"resume={folder}")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("alpha=2",), r"alpha was 4.0, now 2.0"),
        (("strategy=tb_traj",), "strategy was powerflow, now tb_traj"),
        (("finetune=lora",), "finetune was full, now lora"),
    ],
)
def test_another_alpha_or_strategy_is_refused_and_changes_nothing(
    folder: Path, overrides: tuple[str, ...], message: str
) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=f"{message}.*resume_force=true"):
        trained(folder, f"resume={folder}", *overrides)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be changed."""
    return shutil.copytree(local_folder("embedded:tiny"), tmp_path / "model")


def same_task(model: Path) -> tuple[str, ...]:
    return ("model=hf", f"model.path={model}", "model.kind=base")


def test_another_model_is_refused(folder: Path, model: Path) -> None:
    """Of the same shapes, as an instruct model is beside its base."""
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="run: the base model differs"):
        trained(folder, f"resume={folder}", *same_task(model))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_another_vocabulary_is_refused(folder: Path, model: Path) -> None:
    """The same weights, with two tokens exchanged."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids[" 1"], ids[" 2"] = ids[" 2"], ids[" 1"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="run: the tokenizer's vocabulary differs"):
        trained(folder, f"resume={folder}", *same_task(model))


def test_it_goes_on_with_another_alpha_if_that_is_forced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = trained(folder, f"resume={folder}", "alpha=2", "resume_force=true", "refills=3")
    assert (summary["status"], summary["alpha"], summary["refills"]) == ("finished", 2.0, 3)
    out, err = capsys.readouterr()
    assert "warning: resume_force=true: alpha was 4.0, now 2.0" in err
    assert "resume: changed alpha: 4.0 -> 2.0" in out
    assert "resume: changed refills: 2 -> 3" in out
