"""The published numbers are whole, and calibration says honestly what lies within its tolerance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema import CalibrateConfig, EvaluateConfig
from powerflow_lit.evaluating import calibration
from powerflow_lit.evaluating.scores import average_interval, sampling_error, summary
from powerflow_lit.published import CREATIVE, REASONING, models, notes, published

SIX = {"math500", "olympiadbench", "aime24", "aime25", "amc23", "gpqa_diamond"}


@pytest.mark.parametrize("model", models(REASONING))
def test_the_average_of_a_published_row_is_the_mean_of_its_six_benchmarks(model: str) -> None:
    found = published(REASONING, model)
    assert found is not None
    whole = {m: r for m, r in found.rows.items() if len(r) > 1}
    assert {"Base", "PowerFlow", "GRPO"} <= whole.keys()
    for method, row in whole.items():
        assert row.keys() == SIX | {"average"}
        mean = sum(row[b] for b in SIX) / 6
        # rows are rounded to .1, averages were formed before the rounding
        assert row["average"] == pytest.approx(mean, abs=0.06), method


def test_rows_known_by_their_average_alone_leave_the_rest_blank() -> None:
    found = published(REASONING, "Qwen2.5-Math-7B")
    assert found is not None
    assert found.rows["PowerSampling"] == {"average": 39.80}


def test_a_model_of_which_nothing_is_published_has_no_rows() -> None:
    assert published(REASONING, "Qwen3-8B") is None
    assert published(REASONING, None) is None
    assert published(CREATIVE, "Qwen2.5-Math-7B") is None


def test_creative_rows_are_shares_and_powerflow_leads_its_base_in_both() -> None:
    for model in models(CREATIVE):
        found = published(CREATIVE, model)
        assert found is not None
        assert all(0 < v < 1 for row in found.rows.values() for v in row.values())
        ours, base = found.rows["PowerFlow"], found.rows["Instruct"]
        assert all(ours[n] > base[n] for n in ("quality", "diversity_semantic"))
    assert "not known" in notes(CREATIVE)["protocol"]


def test_the_sampling_error_is_the_spread_of_repeated_evaluations() -> None:
    generator = np.random.default_rng(0)
    chances, n = generator.beta(0.5, 0.8, size=60), 16
    shares = generator.binomial(n, chances, size=(4000, 60)) / n
    spread = shares.mean(1).std()
    predicted = np.mean([sampling_error(row, n) for row in shares])
    assert predicted == pytest.approx(spread, rel=0.05)


def test_a_published_spread_is_of_the_size_that_sampling_alone_gives() -> None:
    """The posters quote .27 to .36 points for an average: no problem was resampled for that."""
    sizes = {"math500": 500, "olympiadbench": 675, "aime24": 30, "aime25": 30, "amc23": 40,
             "gpqa_diamond": 198}  # fmt: skip
    found = published(REASONING, "Qwen2.5-Math-1.5B")
    assert found is not None
    # at most: as if each problem had the benchmark's own chance
    errors = [
        math.sqrt((p := found.rows["PowerFlow"][b] / 100) * (1 - p) / (16 * size))
        for b, size in sizes.items()
    ]
    bound = 100 * math.sqrt(sum(e**2 for e in errors)) / 6
    low, high = notes(REASONING)["sem_of_average"]
    assert low < high < bound < 2 * high


def test_means_leave_out_prompts_without_a_figure() -> None:
    figures = [{"avg@2": 0.5, "quality": 1.0}, {"avg@2": 1.0}, {"avg@2": 0.0, "quality": math.nan}]
    found = summary(figures, draws=200, level=0.9, seed=0)
    assert found.metrics == {"val/avg@2": 0.5, "val/quality": 1.0}
    assert found.intervals["val/avg@2"][0] < 0.5 < found.intervals["val/avg@2"][1]
    assert "val/quality" not in found.intervals
    assert found.sampling_errors == {"val/avg@2": pytest.approx(math.sqrt(0.25) / 3)}


def test_the_interval_of_an_average_resamples_within_each_benchmark() -> None:
    generator = np.random.default_rng(1)
    columns = [generator.random(30), generator.random(200)]
    low, high = average_interval(columns, draws=20_000, level=0.95, seed=0)
    error = math.sqrt(sum(c.var() / len(c) for c in columns)) / 2
    mean = sum(c.mean() for c in columns) / 2
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def config(**changed: Any) -> CalibrateConfig:
    values = {"table": REASONING, "method": "PowerFlow", "sampler": "T=1", "tolerance": 0.5,
              "standard_errors": 2.0} | changed  # fmt: skip
    return CalibrateConfig(**values)


def result(value: float, error: float) -> dict[str, Any]:
    return {"T=1": {"metrics": {"val/avg@16": value}, "sampling_errors": {"val/avg@16": error}}}


def test_a_figure_passes_within_two_errors_of_the_difference_and_the_tolerance() -> None:
    row = calibration.row_of(config(), "Qwen2.5-Math-1.5B")
    # published 70.9; allowed 0.5 + 2 sqrt(2) 0.4 = 1.63
    found = {
        ours: calibration.checks(config(), row, {"math500": result(ours / 100, 0.004)}, None)[0]
        for ours in (70.9, 72.5, 69.3, 72.6, 69.2)
    }
    assert found[70.9].allowed == pytest.approx(0.5 + 2 * math.sqrt(2) * 0.4)
    assert [c.verdict for c in found.values()] == ["pass", "pass", "pass", "outside", "outside"]


def test_what_was_not_measured_neither_passes_nor_fails() -> None:
    row = calibration.row_of(config(), "Qwen2.5-Math-1.5B")
    checks = calibration.checks(config(), row, {"math500": result(0.709, 0.004)}, None)
    assert [c.verdict for c in checks] == ["pass"] + ["not measured"] * 6
    assert calibration.verdict(checks) == "pass"
    assert calibration.verdict(checks[1:]) == "not measured"
    worse = calibration.checks(
        config(), row, {"math500": result(0.709, 0.004), "aime24": result(0.5, 0.01)}, None
    )
    assert calibration.verdict(worse) == "outside"


def test_creative_figures_are_compared_in_points_with_the_error_over_prompts() -> None:
    creative = config(table=CREATIVE, tolerance=2.0)
    row = calibration.row_of(creative, "Qwen2.5-1.5B-Instruct")
    ours = {"T=1": {"metrics": {"val/diversity_semantic": 0.36},
                    "intervals": {"val/diversity_semantic": [0.34, 0.38]}}}  # fmt: skip
    quality, diversity = calibration.checks(creative, row, {"creative_writing": ours}, None)
    assert quality.verdict == "not measured"
    assert diversity.published == pytest.approx(33.1)
    assert diversity.standard_error == pytest.approx(4 / (2 * 1.96), rel=1e-3)
    assert diversity.verdict == "pass"
    for embedder, expected in (("hashing-512 (bag of words)", "not measured"), ("a model", "pass")):
        record = {"benchmarks": {"creative_writing": ours}, "embedder": embedder, "judge": None}
        found = calibration.calibrated(creative, row, record, ["creative_writing"], {})
        assert found["verdict"] == expected, "words counted are no meaning"
        assert "judge and embedder are not known (here: none" in found["caveats"][0]


CALIBRATED = sorted((Path(conf_dir()) / "experiment" / "calibrate").glob("*.yaml"))


@pytest.mark.parametrize("path", CALIBRATED, ids=lambda p: p.stem)
def test_each_released_checkpoint_is_calibrated_against_a_row_of_its_own(path: Path) -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        found = typed(compose("evaluate", [f"experiment=calibrate/{path.stem}"]), EvaluateConfig)
    assert found.calibrate is not None
    row = calibration.row_of(found.calibrate, found.model.paper_name)
    assert found.model.path.startswith("crs25-tsinghua/PowerFlow")
    assert row.model in found.model.path, "the row is that of the checkpoint's own model"
    assert found.alpha == (4 if found.calibrate.table == REASONING else 0.5)
    if found.calibrate.table == REASONING:
        assert set(found.benchmarks) == SIX
        assert (found.samples_per_prompt, found.rollout.max_new_tokens) == (16, 3072)
    else:
        assert found.task.name == "creative_writing"


@pytest.mark.parametrize(
    ("changed", "model", "words"),
    [
        ({}, "Qwen3-8B", "model.paper_name=Qwen3-8B: nothing published of it; known: Qwen2.5-1.5B"),
        ({}, None, "model.paper_name=None"),
        ({"method": "SFT"}, "Qwen2.5-1.5B", "calibrate.method=SFT: the rows of .* are Base, Int"),
        ({"table": "code"}, "Qwen2.5-1.5B", "choose reasoning or creative"),
    ],
)
def test_a_row_that_does_not_exist_is_named(
    changed: dict[str, str], model: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        calibration.row_of(config(**changed), model)
