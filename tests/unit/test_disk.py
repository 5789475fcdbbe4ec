"""A disk that is full, as the system's own full device says it: nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from powerflow_lit import run_folder
from powerflow_lit.checkpoint_io import StraightCheckpointIO
from powerflow_lit.disk import DiskError, dropped, explained, named
from powerflow_lit.metrics_csv import MetricsCsv

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def full(path: Path) -> Path:
    """A file that opens, and whose disk has no room."""
    path.symlink_to(FULL)
    return path


def test_a_file_that_cannot_be_replaced_stays_and_is_named(tmp_path: Path) -> None:
    run_folder.write_summary(tmp_path, {"status": "unfinished"})
    aside = full(tmp_path / "summary.json.tmp")
    with pytest.raises(OSError, match="No space left") as caught:
        run_folder.write_summary(tmp_path, {"status": "finished"})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "unfinished"}
    assert not aside.is_symlink(), "what was begun is gone"
    run_folder.write_summary(tmp_path, {"status": "finished"})


def test_metrics_that_cannot_be_written_leave_the_rows_before(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path)
    log.log_metrics({"train/loss": 1.0, "refill": 1}, step=1)
    before = (tmp_path / "metrics.csv").read_text()
    full(tmp_path / "metrics.csv.tmp")
    with pytest.raises(OSError, match=r"metrics\.csv"):
        log.log_metrics({"val/new": 1.0, "refill": 1}, step=2)
    assert (tmp_path / "metrics.csv").read_text() == before


# small tensors fail when the file is closed, large ones while it is written
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_checkpoint_says_what_the_system_said(tmp_path: Path, numbers: int) -> None:
    last, aside = tmp_path / "last.ckpt", full(tmp_path / "last.ckpt.tmp")
    state = {"state_dict": {"w": torch.ones(numbers)}, "epoch": 3}
    writer = StraightCheckpointIO()
    with pytest.raises(OSError, match="No space left") as caught, named(last), dropped(aside):
        writer.save_checkpoint(state, aside)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(last))
    writer.save_checkpoint(state, aside)
    found = torch.load(aside, weights_only=True)
    assert torch.equal(found["state_dict"]["w"], state["state_dict"]["w"])  # type: ignore[index]


def test_what_a_library_says_in_words_becomes_an_error_of_the_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, named(tmp_path / "export"):
            save_file({"w": torch.ones(100_000)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert type(caught.value.__cause__) is SafetensorError
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "export"))


def test_the_line_names_file_reason_and_remedy_and_other_errors_pass() -> None:
    with pytest.raises(DiskError) as caught, explained(lambda: "Do this"), named(Path("a/b")):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert str(caught.value) == "a/b: Disk quota exceeded. Do this"
    with pytest.raises(ConnectionRefusedError), explained(lambda: "Do this"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(KeyError), explained(lambda: "Do this"), named(Path("a/b")):
        raise KeyError("w")
