"""`rollout=vllm_server`: servers that die, come back without weights, or are left behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.vllm_server import VllmServerEngine
from powerflow_lit.types import Sampling
from tests import commands
from tests.faults.faulty_train import servers_of
from tests.faults.runs import (
    QUICK,
    REFILL,
    STEP,
    TICK,
    assert_same_run,
    end_of,
    finish,
    rows_of,
    start,
    summary_of,
    until_line,
)
from tests.serving import Serving, tiny

pytestmark = pytest.mark.faults

OWN = (*QUICK, "rollout=vllm_server", "run_dir=run")
AHEAD = (*OWN, "rollout.overlap=true")
SAMPLING = f"{REFILL}#2>{TICK}#3"  # amid the second refill
BESIDE = "powerflow_lit.rollout.ahead:_Thread._tick#3"  # amid one that is sampled in a thread


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody touched, of the engine in process."""
    folder = tmp_path_factory.mktemp("inside")
    finish(folder, *QUICK, "rollout=vllm", "run_dir=run")
    return folder / "run"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    found = Serving(tiny(max_model_len=128), tmp_path_factory.mktemp("serving") / "log").start()
    try:
        yield found.wait()
    finally:
        found.kill()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the servers too: several with two threads each on two cores hardly move."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_on_a_running_server_is_that_of_the_engine_in_process(
    whole: Path, serving: Serving, tmp_path: Path
) -> None:
    """To the last bit: its weights are updated before each refill, and its seeds are the same."""
    finish(tmp_path, *OWN, f"rollout.engine.addresses=[{serving.address}]")
    assert_same_run(whole, tmp_path / "run")
    gaps = [float(row["selfcheck/engine_logp_gap"] or 0) for row in rows_of(whole / "metrics.csv")]
    assert 0 < max(gaps) < 1e-4
    assert serving.label().endswith(":8"), "eight updates were made"
    assert serving.is_running, "it is not ours to end"


def test_a_server_that_is_killed_amid_a_refill_is_started_again(
    whole: Path, tmp_path: Path
) -> None:
    code, output = end_of(start(tmp_path, *OWN, fault=(SAMPLING, "servers")), within=500)
    assert code == 0, output[-3000:]
    assert "was ended by SIGKILL" in output
    assert "and is started again" in output
    assert_same_run(whole, tmp_path / "run")


def test_a_server_at_an_address_that_was_restarted_by_somebody_gets_its_weights_again(
    whole: Path, serving: Serving, tmp_path: Path
) -> None:
    process = start(tmp_path, *OWN, f"rollout.engine.addresses=[{serving.address}]")
    printed = until_line(process, "refill   1/4")
    serving.kill()
    time.sleep(2)
    serving.start()
    code, output = end_of(process, within=500)
    assert code == 0, output[-3000:]
    output = "".join(printed) + output
    assert f"warning: {serving.address} is waited for, up to 600 s" in output
    assert_same_run(whole, tmp_path / "run")


def test_a_server_that_does_not_come_back_ends_the_run_with_a_line(
    serving: Serving, tmp_path: Path
) -> None:
    serving.wait()
    process = start(tmp_path, *OWN, f"rollout.engine.addresses=[{serving.address}]",
                    "rollout.engine.wait_for_server_s=5")  # fmt: skip
    until_line(process, "refill   1/4")
    serving.kill()
    code, output = end_of(process, within=120)
    serving.start()
    assert code == 2, output[-3000:]
    assert output.splitlines()[-1].startswith(
        f"error: {serving.address} is lost: does not answer, after 5 s"
    )
    assert summary_of(tmp_path / "run")["status"] == "failed"
    serving.wait()
    finish(tmp_path, "resume=run")  # to the end, from the checkpoint


def test_of_two_servers_one_takes_over_what_the_other_had(
    capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    spec = tiny()
    engine = VllmServerEngine(
        spec, addresses=[], servers=2, devices=[], dtype="float32", max_num_seqs=16,
        kv_cache_gb=1, gpu_memory_utilization=0.2, enforce_eager=True, extra={},
        weight_transfer="auto", weights_dir=None, start_s=500, request_s=120,
        wait_for_server_s=60,
    )  # fmt: skip
    prompts = [[10 + i % 50, 11, 12] for i in range(96)]
    sampling = Sampling(8, 24, seed=3)
    killed: list[int] = []

    def kill_one(done: int, tokens: int) -> None:
        if done > 100 and not killed:
            killed.append(servers_of(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    try:
        engine.sync(policy_weights(spec.policy), 1)
        expected = engine.generate(prompts, sampling)
        assert engine.generate(prompts, sampling, kill_one) == expected
        assert killed
        assert "was ended by SIGKILL" in capsys.readouterr().out
        engine.sync(policy_weights(spec.policy), 2)  # waits for the one that is starting
        assert len(servers_of(os.getpid())) == 2
        assert engine.generate(prompts, sampling) == expected
        handed: dict[int, Any] = {}
        engine.generate(prompts, sampling, on_finished=handed.__setitem__)
        assert [handed[number] for number in range(len(prompts))] == expected
        rows = [(p, group[0].token_ids) for p, group in zip(prompts, expected, strict=True)]
        for scored, group in zip(engine.score(rows), expected, strict=True):
            assert scored == pytest.approx(group[0].log_probs, abs=1e-4)
        # more samples than a server decodes at once, and nothing below the bound of min_p
        (many,) = engine.generate(prompts[:1], Sampling(40, 24, seed=3, min_p=0.2))
        assert len(many) == 40
        assert [c.token_ids for c in many[:8]] != [c.token_ids for c in expected[0]]
        for completion in many:
            ids = torch.tensor([[*prompts[0], *completion.token_ids]])
            with torch.no_grad():
                log_probs = spec.policy(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
            own = log_probs.gather(1, ids[0, 3:, None])[:, 0]
            assert bool((own >= log_probs.amax(1) + math.log(0.2) - 1e-4).all())
    finally:
        engine.close()
    assert servers_of(os.getpid()) == []


def test_a_server_of_ours_that_refuses_its_arguments_ends_the_run_with_its_words(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, *OWN, "+rollout.engine.extra.no_such_thing=1")
    code, output = end_of(process, within=300)
    assert code == 2, output[-3000:]
    last = output.splitlines()[-1]
    assert re.match(r"error: vllm serve of this run .* ended with 2: .*--no-such-thing", last), last


def test_an_evaluation_on_a_server_is_that_of_the_engine_in_process(
    serving: Serving, tmp_path: Path
) -> None:
    """Temperatures beside one and greedy decoding too."""
    chosen = {
        "vllm": ["rollout=vllm"],
        "server": ["rollout=vllm_server", f"rollout.engine.addresses=[{serving.address}]"],
    }
    found = {}
    for name, rollout in chosen.items():
        arguments = ["samples_per_prompt=2", "rollout.max_new_tokens=32", f"output={name}"]
        done = commands.command(
            "powerflow_lit.evaluate", [*arguments, *rollout], folder=tmp_path, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        record = json.loads((tmp_path / name / "eval.json").read_text())
        found[name] = _without_times(record["benchmarks"])
    assert found["server"] == found["vllm"]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k != "seconds"}
    return value


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_run_that_ends_amid_a_refill_leaves_no_server_and_can_be_resumed(
    whole: Path, number: str, tmp_path: Path
) -> None:
    process = start(tmp_path, *OWN, fault=(SAMPLING, number))
    printed = until_line(process, "refill   1/4")
    servers = servers_of(process.pid)
    code, output = end_of(process, within=300)
    assert code == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM}[number], output
    assert "Traceback" not in "".join(printed) + output
    deadline = time.monotonic() + 20
    while left := [pid for pid in servers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert len(servers) == 1
    finish(tmp_path, "resume=run")
    assert_same_run(whole, tmp_path / "run")


def test_with_overlap_a_refill_survives_its_server_and_so_does_one_that_is_resumed(
    tmp_path: Path,
) -> None:
    """The server is started anew from a passing thread, whose end must not be the server's."""
    inside = tmp_path / "inside"
    inside.mkdir()
    finish(inside, *QUICK, "rollout=vllm", "rollout.overlap=true", "run_dir=run")
    rows = rows_of(inside / "run" / "metrics.csv")
    assert [r["rollout/staleness"] for r in rows if r["rollout/staleness"]] == ["0.0"] + 3 * ["1.0"]

    killed = tmp_path / "killed"
    killed.mkdir()
    code, output = end_of(start(killed, *AHEAD, fault=(BESIDE, "servers")), within=500)
    assert code == 0, output[-3000:]
    assert "was ended by SIGKILL" in output
    assert_same_run(inside / "run", killed / "run")

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    code, output = end_of(start(stopped, *AHEAD, fault=(f"{STEP}#3", "SIGTERM")), within=300)
    assert code == 128 + signal.SIGTERM, output[-3000:]
    finish(stopped, "resume=run")
    assert_same_run(inside / "run", stopped / "run")
