"""`trainer=fsdp` on two gloo ranks: the steps of ddp, saved in parts, resumed, exported."""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from powerflow_lit.models.loading import load_model, local_folder
from powerflow_lit.resume import CheckpointError, checkpoint_of, load_policy, read_checkpoint
from powerflow_lit.shard_files import file_of, shard_folder, whole_weights
from tests.two_ranks import as_torchrun_starts

pytestmark = pytest.mark.slow

# several microbatches an update, of which the ranks have unequal numbers, and checkpointed layers
QUICK = (
    "debug=fast", "logger=none", "rollout=hf", "refills=2", "callbacks.evaluation.max_prompts=4",
    "rollout.max_new_tokens=12", "model.threads=1", "tokens_per_microbatch=60", "log_z=head",
    "model.gradient_checkpointing=true", "optimizer.lr=1e-4",
    "callbacks.evaluation.every_n_refills=1",
)  # fmt: skip


def trained(folder: Path, trainer: str, *overrides: str) -> None:
    for found in as_torchrun_starts(folder, *QUICK, *overrides, trainer=trainer):
        assert found.returncode == 0, found.stderr


def refused(folder: Path, trainer: str, *overrides: str) -> list[str]:
    """What the ranks say for an error."""
    found = as_torchrun_starts(folder, *QUICK, *overrides, trainer=trainer)
    assert [one.returncode for one in found] == [2, 2]
    return [line for one in found for line in one.stderr.splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run under either trainer, and one that was broken off and resumed."""
    folder = tmp_path_factory.mktemp("fsdp")
    trained(folder, "ddp", "run_dir=ddp")
    trained(folder, "fsdp", "run_dir=fsdp")
    trained(folder, "fsdp", "run_dir=halves", "refills=1", "callbacks.export=false")
    trained(folder, "fsdp", "run_dir=halves", "resume=halves")
    return folder


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def weights_of(run: Path) -> dict[str, Tensor]:
    return whole_weights(last(run), read_checkpoint(last(run)))


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def sampled(run: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [(row["prompt"], row["response"]) for row in rows]


def test_it_takes_the_steps_of_ddp(runs: Path) -> None:
    ddp, fsdp = weights_of(runs / "ddp"), weights_of(runs / "fsdp")
    assert ddp.keys() == fsdp.keys()
    for name, weight in ddp.items():
        torch.testing.assert_close(fsdp[name], weight, rtol=0, atol=1e-5, msg=name)
    for one, other in zip(rows_of(runs / "ddp"), rows_of(runs / "fsdp"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = value == other[name]
            assert same or float(other[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), (
                name
            )
    assert sampled(runs / "ddp") == sampled(runs / "fsdp")


def test_the_policy_has_moved(runs: Path) -> None:
    start = AutoModelForCausalLM.from_pretrained(local_folder("embedded:tiny")).state_dict()
    moved = weights_of(runs / "fsdp")
    gaps = [float((moved[f"policy.{n}"] - w).abs().max()) for n, w in start.items()]
    assert min(gaps) > 5e-5  # of which 1e-5 is little


def test_a_resumed_run_ends_as_one_never_touched_bit_by_bit(runs: Path) -> None:
    whole, halves = weights_of(runs / "fsdp"), weights_of(runs / "halves")
    assert all(torch.equal(halves[name], weight) for name, weight in whole.items())
    assert rows_of(runs / "fsdp") == rows_of(runs / "halves")


def test_each_rank_keeps_its_half_and_parts_that_no_checkpoint_names_are_gone(runs: Path) -> None:
    checkpoints = runs / "fsdp" / "checkpoints"
    assert len(list(checkpoints.glob("shards-*"))) == 2  # of the last and the one before
    folder = shard_folder(last(runs / "fsdp"), read_checkpoint(last(runs / "fsdp")))
    assert folder is not None
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    whole = last(runs / "ddp").stat().st_size
    assert len(sizes) == 2
    assert all(0.4 * whole < size < 0.65 * whole for size in sizes)


def test_the_export_is_an_ordinary_model_with_the_trained_weights(runs: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(runs / "fsdp" / "export")
    weights = weights_of(runs / "fsdp")
    for name, weight in exported.state_dict().items():
        assert torch.equal(weight, weights[f"policy.{name}"]), name
    files = [{p.name for p in (runs / t / "export").iterdir()} for t in ("ddp", "fsdp")]
    assert files[0] == files[1]
    assert json.loads((runs / "fsdp" / "summary.json").read_text())["status"] == "finished"


def test_one_process_reads_the_parts_for_evaluation(runs: Path) -> None:
    model = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    policy = load_policy(model, runs / "fsdp")
    exported = AutoModelForCausalLM.from_pretrained(runs / "fsdp" / "export").state_dict()
    assert all(torch.equal(w, exported[n]) for n, w in policy.state_dict().items())


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(runs / "fsdp", tmp_path / "run")


def second_part(run: Path, name: str = "last.ckpt") -> Path:
    path = last(run).with_name(name)
    folder = shard_folder(path, torch.load(path, weights_only=True))
    assert folder is not None
    return file_of(folder, 1)


def test_a_part_that_is_cut_short_or_missing_makes_way_for_the_checkpoint_before(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(second_part(run), 100)
    point = checkpoint_of(run)
    assert point is not None
    assert (point.path.name, point.refills) == ("previous.ckpt", 1)
    assert "rank-00001.pt has 100 bytes and had" in capsys.readouterr().err
    second_part(run, "previous.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"has 100 bytes.*rank-00001.pt is missing"):
        checkpoint_of(run)


def test_a_part_with_a_flipped_bit_is_named_on_all_ranks(run: Path) -> None:
    part = second_part(run)
    with zipfile.ZipFile(part) as entries:
        largest = max(entries.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(part.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    part.write_bytes(content)
    lines = refused(run.parent, "fsdp", "run_dir=run", "resume=run", "refills=3")
    assert len(lines) == 2
    assert all("rank-00001.pt" in line and "was altered" in line for line in lines)


def test_a_checkpoint_of_the_other_trainer_is_refused_in_a_line(runs: Path, run: Path) -> None:
    said = refused(run.parent, "ddp", "run_dir=run", "resume=run", "refills=3")
    assert all("resume it with trainer=fsdp" in line for line in said)
    shutil.copytree(runs / "ddp", run.parent / "whole")
    said = refused(run.parent, "fsdp", "run_dir=whole", "resume=whole", "refills=3")
    assert all("was not written with trainer=fsdp" in line for line in said)
