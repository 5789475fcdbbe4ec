"""A run that is killed without warning, anywhere, goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.runs import (
    EVALUATION,
    QUICK,
    REFILL,
    SAVE,
    STEP,
    TICK,
    assert_same_run,
    end_of,
    finish,
    left_of,
    start,
)

pytestmark = pytest.mark.faults

MOMENTS = {
    "first refill": f"{REFILL}#1>{TICK}#5",
    "base's evaluation": f"{EVALUATION}#1>{TICK}#5",
    "refill": f"{REFILL}#3>{TICK}#5",
    "step": f"{STEP}#6",
    "save": f"{SAVE}#2>os:fsync#1",
    "rename": f"{SAVE}#2>os:replace#2",
    "evaluation": f"{EVALUATION}#2>{TICK}#5",
    "export": "powerflow_lit.training:export#1",
}


@pytest.fixture(scope="module", params=["hf", "vllm"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody touched, in the folder `whole`; its engine is the folder's name."""
    folder = tmp_path_factory.mktemp(request.param)
    finish(folder, *QUICK, f"rollout={request.param}", "run_dir=whole")
    return folder / "whole"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_there_ends_as_one_never_touched(
    whole: Path, moment: str, tmp_path: Path
) -> None:
    engine = "hf" if whole.parent.name.startswith("hf") else "vllm"
    if engine == "vllm" and moment not in ("refill", "step", "save", "evaluation"):
        pytest.skip("the engine has no part in it")
    settings = (*QUICK, f"rollout={engine}")
    process = start(tmp_path, *settings, fault=(MOMENTS[moment], "SIGKILL"))
    code, output = end_of(process, within=300)
    assert code == -signal.SIGKILL, output[-3000:]
    assert left_of(process) == "", "an engine without its run"
    finish(tmp_path, *settings, "resume=auto")
    (config,) = tmp_path.glob("outputs/**/config.yaml")
    assert_same_run(whole, config.parent)


def test_a_run_killed_within_a_refill_repeats_no_update_that_it_has_saved(
    whole: Path, tmp_path: Path
) -> None:
    if not whole.parent.name.startswith("hf"):
        pytest.skip("the engine has no part in it")
    settings = (*QUICK, "rollout=hf", "run_dir=run", "callbacks.checkpoint.every_n_updates=1")
    process = start(tmp_path, *settings, fault=(MOMENTS["step"], "SIGKILL"))
    assert end_of(process, within=300)[0] == -signal.SIGKILL
    printed = finish(tmp_path, "resume=run")
    assert "after 2 refills, 5 updates" in printed
    assert_same_run(whole, tmp_path / "run")
