"""Words about runs: each appears for what it means, with the numbers, and not for its opposite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from powerflow_lit.config import conf_dir
from powerflow_lit.config.schema_tools import VerdictConfig
from powerflow_lit.reporting.runs import read_run
from powerflow_lit.reporting.verdicts import Evidence, Finding, evidence, together, verdict
from tests.run_folders import make_run

LIMITS = VerdictConfig(**yaml.safe_load((Path(conf_dir()) / "report.yaml").read_text())["verdict"])
HEALTHY = Evidence(
    status="finished",
    start={"length_mean": 23.0, "repetition": 0.03, "truncated_frac": 0.02, "format_rate": 0.88},
    end={"length_mean": 29.0, "repetition": 0.004, "truncated_frac": 0.0, "format_rate": 0.99},
    headline_name="pass@1",
    headline={0: 0.32, 10: 0.44, 20: 0.55, 30: 0.6, 40: 0.65, 50: 0.69, 60: 0.73},
    spread={0: 1.7, 20: 1.5, 40: 1.4, 60: 1.2},
    on_policy=dict.fromkeys(range(1, 61), 0.4),
)  # fmt: skip


def words(seen: Evidence) -> dict[str, Finding]:
    return {f.words: f for f in verdict(seen, LIMITS)}


def ending(**changed: float) -> Evidence:
    return replace(HEALTHY, end={**HEALTHY.end, **changed})


def test_a_healthy_run_is_converging_and_still_improving_and_nothing_else() -> None:
    found = words(HEALTHY)
    assert set(found) == {"converging", "still improving"}
    assert {f.tone for f in found.values()} == {"good"}
    assert "1.7 → 1.2 (-29%)" in found["converging"].numbers
    assert "0.650 at refill 40" in found["still improving"].numbers


@pytest.mark.parametrize(
    ("changed", "said", "numbers"),
    [
        ({"length_mean": 5.5}, "collapsed in length", "23.0 → 5.5 tokens (24% of the base's)"),
        ({"length_mean": 90.0}, "drifted long", "391%"),
        ({"repetition": 0.7}, "hacked by repetition", "0.030 → 0.700"),
        ({"truncated_frac": 0.6}, "truncated", "2% → 60%"),
        ({"format_rate": 0.1}, "lost the format", "88% → 10%"),
    ],
)
def test_each_way_of_degenerating_has_its_word_and_comes_first(
    changed: dict[str, float], said: str, numbers: str
) -> None:
    found = verdict(ending(**changed), LIMITS)
    assert [f.words for f in found if f.tone == "bad"] == [said]
    assert found[0].words == said
    assert numbers in found[0].numbers


def test_a_small_residual_on_own_samples_alone_looks_like_a_collapse() -> None:
    flat = replace(HEALTHY, spread={0: 30.0, 30: 30.5, 60: 29.5})
    found = words(replace(flat, on_policy=dict.fromkeys(range(60), 2.0)))
    assert "looks collapsed rather than converged" in found
    assert "converging" not in found
    # a large residual on own samples as well is no collapse, only no convergence
    assert "no clear convergence yet" in words(
        replace(flat, on_policy=dict.fromkeys(range(60), 25.0))
    )
    # and when the spread fell, a small residual on own samples is what convergence looks like
    fell = replace(HEALTHY, on_policy=dict.fromkeys(range(60), 0.01))
    assert "converging" in words(fell)


def test_one_stray_refill_does_not_hide_a_small_residual() -> None:
    own = {r: 40.0 if r in (57, 60) else 2.0 for r in range(1, 61)}
    seen = replace(HEALTHY, spread={0: 30.0, 30: 30.5, 60: 29.5}, on_policy=own)
    assert "looks collapsed rather than converged" in words(seen)


def test_a_growing_spread_without_an_on_policy_figure_is_said_as_such() -> None:
    seen = replace(HEALTHY, spread={0: 1.0, 30: 1.2, 60: 1.5}, on_policy={})
    assert "moving away from the target on base samples" in words(seen)


def test_a_peak_that_was_lost_is_named_with_its_refill() -> None:
    seen = replace(HEALTHY, headline={0: 0.3, 10: 0.44, 20: 0.5, 40: 0.4, 60: 0.35})
    found = words(seen)["peaked and fell"]
    assert "lost 30% of its peak" in found.numbers
    assert "0.500 at refill 20" in found.numbers
    assert "still improving" not in words(seen)


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ({0: 0.3, 20: 0.5, 40: 0.6, 60: 0.605}, "improved, then levelled off"),
        ({0: 0.3, 20: 0.3, 40: 0.3, 60: 0.3}, "no gain over its base"),
        ({0: 0.3, 20: 0.2, 40: 0.15, 60: 0.1}, "ended below its base"),
    ],
)
def test_the_headline_s_course_has_one_word(curve: dict[int, float], said: str) -> None:
    found = set(words(replace(HEALTHY, headline=curve))) - {"converging"}
    assert found == {said}


def test_without_any_evidence_nothing_is_claimed() -> None:
    blank = Evidence("finished", {}, {}, "", {}, {}, {})
    assert list(words(blank)) == ["nothing can be said"]
    unfinished = replace(blank, status="diverged", after="after 3 of 60 refills")
    assert words(unfinished)["diverged"].numbers == "after 3 of 60 refills"


def test_evidence_takes_both_ends_of_a_metric_from_one_source(tmp_path: Path) -> None:
    curves = {
        "val/pass@1": [0.2, 0.3, 0.4, 0.5], "val/length_mean": [20.0, 9, 9, 10.0],
        # refill 1's rollouts are the base's
        "rollout/length_mean": [0, 99.0, 98.0, 97.0], "rollout/repetition": [0, 0.1, 0.2, 0.4],
    }  # fmt: skip
    run, remarks = read_run(make_run(tmp_path / "a", curves, refills=3), "a")
    assert run is not None
    assert remarks == []
    seen = evidence(run, "val/pass@1", tail=3)
    assert (seen.start["length_mean"], seen.end["length_mean"]) == (20.0, 10.0)
    # one point is the end of so short a curve
    assert (seen.start["repetition"], seen.end["repetition"]) == (0.1, 0.4)
    assert seen.headline == {0: 0.2, 1: 0.3, 2: 0.4, 3: 0.5}


def test_findings_of_seeds_are_set_together_bad_and_frequent_first() -> None:
    good, bad = Finding("fine", "1", "good"), Finding("broken", "2", "bad")
    found = together([("seed 0", good), ("seed 0", bad), ("seed 1", good)])
    assert found == [("broken", "bad", ["seed 0: 2"]), ("fine", "good", ["seed 0: 1", "seed 1: 1"])]
