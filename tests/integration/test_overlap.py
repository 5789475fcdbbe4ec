"""`rollout.overlap=true`: refill r + 1 is sampled while refill r is trained on."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import PreTrainedModel

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model, load_tokenizer
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.prompting import decode, encode_prompts
from powerflow_lit.rollout import EngineError
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.training import run
from powerflow_lit.types import Prompt, Sampling
from tests.faults.runs import assert_same_run, last_checkpoint, rows_of

# every rollout of a refill is kept in samples.jsonl; the rate moves the policy at once
SMALL = (
    "debug=fast", "rollout=hf", "logger=none", "optimizer.lr=1e-3", "optimizer.warmup_steps=0",
    "callbacks.samples.per_refill=16", "callbacks.evaluation.max_prompts=2",
    "callbacks.evaluation.samples_per_prompt=1", "rollout.engine.sequences_per_batch=16",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(folder: Path, *overrides: str, small: tuple[str, ...] = SMALL) -> Path:
    typed = [*small, f"run_dir={folder}", *overrides]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = train_config(compose("train", overrides=typed))
    run(config, folder, typed)
    return folder


def responses(folder: Path, refill: int) -> list[tuple[str, str]]:
    """(prompt, response) of each rollout of a refill, counted from 0."""
    rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [(r["prompt"], r["response"]) for r in rows if r["refill"] == refill + 1]


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "overlapped"
    return trained(folder, "refills=3", "rollout.overlap=true")


def model() -> PreTrainedModel:
    return load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )


def drawn(policy: PreTrainedModel, refill: int, prompts: list[str]) -> list[tuple[str, str]]:
    """What a policy answers to a refill's prompts, four times each, drawn apart from any run."""
    tokenizer = load_tokenizer("embedded:tiny", trust_remote_code=False)
    path = str(folder_of("tiny"))
    spec = EngineSpec(policy, path, pad_id=int(tokenizer.pad_token_id),
                      eos_ids=(int(tokenizer.eos_token_id),), max_model_len=128, seed=0,
                      trust_remote_code=False)  # fmt: skip
    engine = HfEngine(spec, sequences_per_batch=16, tokens_per_microbatch=4096, logit_chunk_mb=8)
    engine.sync(policy_weights(policy), 0)
    seed = random.Random(f"0-{refill}").randrange(2**31)
    asked = [Prompt(i, text) for i, text in enumerate(prompts)]
    ids = encode_prompts(tokenizer, asked, "plain")
    groups = engine.generate([ids[p.id] for p in asked], Sampling(4, 32, seed=seed))
    return [
        (prompt.text, decode(tokenizer, c.token_ids))
        for prompt, group in zip(asked, groups, strict=True)
        for c in group
    ]


def test_each_refill_is_sampled_from_the_weights_that_it_says(
    overlapped: Path, tmp_path: Path
) -> None:
    """Refills 0 and 1 from the first weights, refill 2 from those after refill 0's updates."""
    one = trained(tmp_path / "one", "refills=1")
    first, after_one = model(), model()
    state = last_checkpoint(one)["state_dict"]
    weights = {n.removeprefix("policy."): w for n, w in state.items() if n.startswith("policy.")}
    after_one.load_state_dict(weights)
    for refill, policy, other in ((0, first, after_one), (1, first, after_one),
                                  (2, after_one, first)):  # fmt: skip
        found = responses(overlapped, refill)
        prompts = [prompt for prompt, _ in found[::4]]
        assert found == drawn(policy, refill, prompts)
        assert found != drawn(other, refill, prompts)


def test_staleness_weights_and_sample_size_are_logged(overlapped: Path) -> None:
    rows = rows_of(overlapped / "metrics.csv")[1:]  # after the base's evaluation
    assert [r["rollout/staleness"] for r in rows] == ["0.0", "", "1.0", "", "1.0", ""]
    assert float(rows[0]["train/ess"]) == pytest.approx(1, abs=1e-5), "the policy's own"
    for row in rows[2:]:
        assert float(row["train/ess"]) < 0.9999
        assert float(row["train/is_weight_min"]) < float(row["train/is_weight_max"])
    assert {r["selfcheck/engine_logp_gap"] for r in rows} != {""}
    assert all(float(r["selfcheck/engine_logp_gap"] or 0) < 1e-4 for r in rows)
    versions = {t["policy_version"] for ts in _refills(overlapped).values() for t in ts}
    assert versions == {2}, "of the last refill: the weights after the first two updates"


def _refills(folder: Path) -> dict[int, list[dict[str, int]]]:
    return last_checkpoint(folder)["RolloutDataModule"]["buffer"]["refills"]


def test_it_ends_as_any_other_run_of_it_also_when_it_is_taken_up_in_its_middle(
    overlapped: Path, tmp_path: Path
) -> None:
    """The checkpoint holds what was sampled ahead, of weights that it does not hold."""
    again = tmp_path / "again"
    trained(again, "refills=3", "rollout.overlap=true", "callbacks.checkpoint.every_n_updates=1",
            "callbacks.evaluation.every_n_refills=1")  # fmt: skip
    # evaluations wait for the engine and change nothing that it samples
    assert responses(again, 2) == responses(overlapped, 2)
    first = tmp_path / "run"
    with pytest.raises(SystemExit):  # a signal between the third update and the fourth
        _stopped(first)
    ahead = last_checkpoint(first)["RolloutDataModule"]["sampled_ahead"]
    assert (ahead["refill"], ahead["policy_version"]) == (2, 2)
    trained(first, "refills=3", "rollout.overlap=true", "resume=auto")
    assert_same_run(overlapped, first)


def _stopped(folder: Path) -> None:
    import signal

    from powerflow_lit.module import PowerFlowModule

    real, calls = PowerFlowModule.configure_gradient_clipping, []

    def counting(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PowerFlowModule, "configure_gradient_clipping", counting)
        trained(folder, "refills=3", "rollout.overlap=true")


def test_an_error_of_the_thread_is_the_runs_and_leaves_no_thread(tmp_path: Path) -> None:
    engine = "rollout.engine._target_=tests.faults.faulty.FailingEngine"
    with pytest.raises(EngineError, match="fell over in thread 'refill 2'"):
        trained(tmp_path, "refills=3", "rollout.overlap=true", engine)
    assert not [t for t in threading.enumerate() if t.name.startswith("refill")]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "fell over" in summary["error"]


def test_log_probs_that_are_no_numbers_are_sampled_again_from_the_weights_of_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = "rollout.engine._target_=tests.faults.faulty.NanOnceEngine"
    trained(tmp_path, "refills=2", "rollout.overlap=true", engine)
    assert "warning: refill 2 is sampled anew: log-probs are nan" in capsys.readouterr().out
    rows = rows_of(tmp_path / "metrics.csv")
    assert [r["rollout/staleness"] for r in rows if r["rollout/staleness"]] == ["0.0", "0.0"]
