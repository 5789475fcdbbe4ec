"""Runs that sample ahead in a thread, killed and stopped."""

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
    assert_same_run,
    end_of,
    finish,
    left_of,
    start,
)

pytestmark = pytest.mark.faults

SETTINGS = (*QUICK, "rollout.overlap=true", "run_dir=run")
THREAD = "powerflow_lit.rollout.rebuilding:RebuildingEngine.generate_as_it_is"
MOMENTS = {
    "as it begins to sample": f"{THREAD}#2",
    "an update beside it": f"{THREAD}#2>{STEP}#1",
    "before its refill is kept": f"{REFILL}#3>powerflow_lit.scoring:Scorer.__call__#1",
    "a save that waits for it": f"{SAVE}#2",
    "an evaluation that waits for it": f"{EVALUATION}#2",
}


@pytest.fixture(scope="module", params=["hf", "vllm"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    finish(folder, *SETTINGS, f"rollout={request.param}")
    return folder / "run"


def engine_of(whole: Path) -> str:
    return "hf" if whole.parent.name.startswith("hf") else "vllm"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_there_ends_as_one_never_touched(
    whole: Path, moment: str, tmp_path: Path
) -> None:
    engine = engine_of(whole)
    if engine == "vllm" and moment != "an update beside it":
        pytest.skip("the engine has no part in it")
    settings = (*SETTINGS, f"rollout={engine}")
    process = start(tmp_path, *settings, fault=(MOMENTS[moment], "SIGKILL"))
    code, output = end_of(process, within=300)
    assert code == -signal.SIGKILL, output[-3000:]
    assert left_of(process) == "", "an engine without its run"
    finish(tmp_path, *settings, "resume=auto")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("moment", ["an update beside it", "as it begins to sample"])
def test_a_stop_keeps_what_is_being_sampled_and_resumes_bit_by_bit(
    whole: Path, moment: str, tmp_path: Path
) -> None:
    settings = (*SETTINGS, f"rollout={engine_of(whole)}")
    process = start(tmp_path, *settings, fault=(MOMENTS[moment], "SIGTERM"))
    code, output = end_of(process, within=300)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert "Traceback" not in output
    assert left_of(process) == ""
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")


def test_ctrl_c_twice_leaves_no_process(tmp_path: Path) -> None:
    fault = (MOMENTS["an update beside it"], "SIGINT*2")
    process = start(tmp_path, *SETTINGS, "rollout=vllm", fault=fault)
    code, _ = end_of(process, within=300)
    assert code == 130
    assert left_of(process) == ""
