"""`rollout.score_while_generating=true`: the base scores what is there as the rest is sampled."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from powerflow_lit.early_scoring import EarlyScores
from powerflow_lit.rollout.engine import Row
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.scoring import Scorer
from powerflow_lit.types import Completion
from tests.faults.runs import assert_same, assert_same_run, last_checkpoint
from tests.integration.test_overlap import one_thread, trained  # noqa: F401 - autouse

EARLY = (
    "refills=2", "rollout.score_while_generating=true", "rollout.engine.sequences_per_batch=4",
    "callbacks.evaluation.every_n_refills=1",
)  # fmt: skip
PROMPTS = [(1, 2), (3,), (4, 5, 6)]


def completions(*responses: tuple[int, ...]) -> list[Completion]:
    return [Completion(ids, (), truncated=False) for ids in responses]


def sums(rows: Sequence[Row]) -> list[Tensor]:
    return [torch.tensor([float(sum(prompt)), float(sum(ids))]) for prompt, ids in rows]


def test_results_come_in_the_order_of_the_prompts_whatever_finished_first() -> None:
    with EarlyScores(PROMPTS, sums) as early:
        for number in (2, 0, 1):
            early.add(number, completions((number,), (10 + number, 1)))
    found = [row.tolist() for row in early.results()]
    assert found == [[3, 0], [3, 11], [3, 1], [3, 12], [15, 2], [15, 13]]


def test_what_an_engine_built_anew_says_replaces_what_the_poisoned_one_said() -> None:
    with EarlyScores(PROMPTS, sums) as early:
        for answer in (7, 8):
            early.add(0, completions((answer,)))
    assert [row.tolist() for row in early.results()] == [[3, 8]]


def test_an_error_of_the_pass_is_raised_and_a_broken_off_generation_leaves_no_thread() -> None:
    def fails(rows: Sequence[Row]) -> list[Tensor]:
        raise ValueError("no numbers")

    with EarlyScores(PROMPTS, fails) as early:
        early.add(0, completions((1,)))
    with pytest.raises(ValueError, match="no numbers"):
        early.results()
    with pytest.raises(KeyboardInterrupt):
        _broken_off()
    assert not [t for t in threading.enumerate() if t.name.startswith("scoring")]


def _broken_off() -> None:
    with EarlyScores(PROMPTS, sums) as early:
        early.add(0, completions((1,)))
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def early_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run, and what happened in it: `sampled` a batch of the engine's, `scored` a prompt."""
    events: list[str] = []
    real_batch, real_score = HfEngine._generate, Scorer._base_log_probs

    def batch(self: Any, *args: Any) -> Any:
        found = real_batch(self, *args)
        events.append("sampled")
        return found

    def score(self: Any, *args: Any) -> Any:
        found = real_score(self, *args)
        events.append("scored" if threading.current_thread().name.startswith("scoring") else "late")
        return found

    folder = tmp_path_factory.mktemp("early") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfEngine, "_generate", batch)
        patch.setattr(Scorer, "_base_log_probs", score)
        trained(folder, *EARLY)
    return folder, events


def test_prompts_are_scored_before_the_last_response_is_there(
    early_run: tuple[Path, list[str]],
) -> None:
    _, events = early_run
    assert "late" not in events
    assert events.count("scored") == 2 * 4, "each prompt of two refills once"
    last = max(i for i, event in enumerate(events) if event == "sampled")
    assert "scored" in events[:last]


def test_it_changes_no_number_but_the_last_digits_and_is_the_same_each_time(
    early_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = early_run
    again = trained(tmp_path / "again", *EARLY)
    assert_same_run(folder, again)
    plain = trained(tmp_path / "plain", *EARLY, "rollout.score_while_generating=false")
    for found, expected in zip(_base(folder), _base(plain), strict=True):
        assert_same(found.shape, expected.shape)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def _base(folder: Path) -> list[Tensor]:
    refills = last_checkpoint(folder)["RolloutDataModule"]["buffer"]["refills"]
    return [t["log_p_base"] for ts in refills.values() for t in ts]


def test_it_is_taken_up_where_it_was_left_bit_by_bit(
    early_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    trained(tmp_path, *EARLY, "refills=1")
    trained(tmp_path, *EARLY, f"resume={tmp_path}")
    assert_same_run(early_run[0], tmp_path)
