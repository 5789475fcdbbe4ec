"""The report from folders to files: what is amiss is said, and the page is always written."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from powerflow_lit import report
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema_tools import ReportConfig
from powerflow_lit.reporting.evaluations import pass_lines, read_evaluations
from powerflow_lit.reporting.runs import read_runs
from tests.run_folders import make_run, write_problems

PASS = "val/pass@1"


def reported(folder: Path, **changed: Any) -> tuple[int, str]:
    """Exit code and page of a report on all runs of the folder."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        defaults = compose("report")
    OmegaConf.set_struct(defaults, False)
    asked = {"runs": [str(folder)], "output": str(folder / "out"), "dpi": 40} | changed
    config = typed(OmegaConf.merge(defaults, OmegaConf.create(asked)), ReportConfig)  # type: ignore[arg-type]
    code = report.run(config, "python -m powerflow_lit.report")
    return code, (Path(config.output) / "index.html").read_text()


def results(folder: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (folder / "out" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cut_last_line(run: Path) -> None:
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.rstrip()[:-1])


def edit(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def edited_summary(**changed: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | changed))

    return change


def never_evaluated(run: Path) -> None:
    edited_summary(final={}, base={})(run)
    (run / "metrics.csv").write_text("step,refill,train/loss\n1,1,2\n")


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a last line": (cut_last_line, "half-written line"),
    "empty metrics.csv": (edit("metrics.csv", ""), "metrics.csv is missing or empty"),
    "header only": (edit("metrics.csv", "step,refill\n"), "metrics.csv is missing or empty"),
    "binary metrics.csv": (lambda r: (r / "metrics.csv").write_bytes(b"\xff\x00\n\x01") and None,
                           "metrics.csv is missing or empty"),
    "truncated summary": (edit("summary.json", '{"status": "fini'), "summary.json unreadable"),
    "summary is a list": (edit("summary.json", "[1]"), "summary.json holds no object"),
    "summary without keys": (edit("summary.json", '{"seed": 1}'), "unknown after 4 of 4 refills"),
    "no summary": (lambda r: (r / "summary.json").unlink(), "no summary.json"),
    "no config": (lambda r: (r / "config.yaml").unlink(), "no config.yaml"),
    "broken config": (edit("config.yaml", "a: [1"), "config.yaml unreadable"),
    "config is a list": (edit("config.yaml", "- 1"), "config.yaml holds no settings"),
    "nan": (edit("metrics.csv", f"step,refill,{PASS}\n0,0,nan\n2,1,inf\n4,2,0.5\n"), PASS),
    "nan in summary": (edited_summary(final={PASS: float("nan")}), f"final {PASS}"),
    "no val metrics": (never_evaluated, "no val/ metrics"),
    "another task": (lambda r: (make_run(r, task__name="creative"), None)[1], "several tasks"),
    "interrupted": (edited_summary(status="interrupted", refills=2), "interrupted after 2 of 4"),
    "failed": (edited_summary(status="failed", error="OutOfMemory:\n 3 GiB"), "OutOfMemory: 3 GiB"),
    "texts for figures": (edited_summary(wall_s="long", tokens=None, versions=[1], refills="x",
                                         base_decodings=3, final="x"), ""),
    "no refill column": (edit("metrics.csv", "step,val/pass@1\n1,0.5\n"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_run_is_a_warning_beside_a_whole_report(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", {PASS: [0.2, 0.3, 0.4, 0.5, 0.75]})
    spoil, warning = SPOILED[case]
    spoil(make_run(tmp_path / "spoiled", seed=1))
    code, page = reported(tmp_path)
    printed = capsys.readouterr().out
    assert code == 0
    assert "good" in {row["run"] for row in results(tmp_path)}
    assert "0.75" in {row["final_pass@1"] for row in results(tmp_path)}
    if warning:
        assert warning in page
        line = next(x for x in printed.splitlines() if x.startswith("warning") and warning in x)
        assert "spoiled" in line or case == "another task"


@pytest.mark.parametrize("case", sorted(set(SPOILED) - {"another task"}))
def test_a_spoiled_run_on_its_own_still_gives_a_page(tmp_path: Path, case: str) -> None:
    SPOILED[case][0](make_run(tmp_path / "spoiled"))
    code, page = reported(tmp_path)
    assert "</html>" in page
    assert code in (0, 2)
    assert (code == 2) == (not (tmp_path / "out" / "results.csv").exists())


def test_jobs_of_a_sweep_that_left_nothing_are_reported_missing(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "done")
    (tmp_path / "sweep" / "crashed").mkdir()
    crash = {"status": "failed", "error": "CUDA error", "strategy": "la_tb"}
    (tmp_path / "sweep" / "crashed" / "summary.json").write_text(json.dumps(crash))
    jobs = [{"folder": n, "overrides": [f"tag={n}"]} for n in ("done", "crashed", "absent")]
    sweep = {"study": "my study", "commands": [["python -m x", "-m", "a=[1, 2]"]], "jobs": jobs}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sweep))
    runs, remarks = read_runs([str(tmp_path)])
    assert [r.folder.name for r in runs] == ["done"]
    assert len(remarks) == 2
    assert "crashed: missing (tag=crashed): no metrics.csv, CUDA error" in remarks[0]
    assert "absent: missing (tag=absent): no folder" in remarks[1]
    _, page = reported(tmp_path)
    assert "PowerFlow: my study" in page
    assert "python -m x -m &#x27;a=[1, 2]&#x27;" in page
    (tmp_path / "sweep" / "sweep.json").write_text('{"jobs": [3]}')
    assert any("sweep.json unreadable" in r for r in read_runs([str(tmp_path)])[1])


def test_without_a_usable_run_there_is_a_page_and_one_line_of_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "powerflow_lit.report", "runs=[empty,nowhere]", "output=out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: no usable run: see out/index.html"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "nowhere: no such folder" in page
    assert "empty: no run folder there" in page


def test_the_command_starts_without_torch_and_takes_dotted_filters(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "x")
    make_run(tmp_path / "a" / "y", strategy="tb_traj")
    code = (
        "import sys; sys.argv = ['report', 'runs=[a]', 'output=out', 'dpi=40', "
        "'where={strategy.name: [powerflow]}']\n"
        "from powerflow_lit.report import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "assert not {'torch', 'lightning', 'transformers', 'vllm'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs left out by where=" in done.stdout
    assert "tb_traj" not in (tmp_path / "out" / "table.md").read_text()


def everything(folder: Path) -> Path:
    """Two groups with problems, base decodings, diagnostics, and an evaluation."""
    base = {"a": 0.25, "b": 0.5, "c": 0.0, "d": 0.25}
    for strategy, gain in (("powerflow", 0.5), ("tb_traj", 0.0)):
        for seed in (0, 1):
            final = {p: v + gain * (seed + 1) / 2 for p, v in base.items()}
            means = [sum(s.values()) / 4 for s in (base, base, final)]
            curves = {
                "val/avg@4": means, PASS: means, "val/quality": [0.5, 0.6, 0.7],
                "train/log_z": [-2, -1, -1], "train/log_z_group": [-1, -1, -1],
                "selfcheck/residual_std_on_base": [2, 1.5, 1], "train/residual_std": [1, 1, 1],
                "train/ess": [1, 1, 1], "train/is_clip_frac": [0, 0, 0],
                "rollout/length_mean": [20, 20, 21],
            }  # fmt: skip
            problems = {"T=1": base, "T=0.5": base, "T=2,min_p=0.05": base, "final": final}
            make_run(folder / "runs" / f"{strategy}{seed}", curves, problems=problems,
                     strategy=strategy, seed=seed, refills=2)  # fmt: skip
    scored = folder / "scored"
    scored.mkdir()
    figures = {"val/avg@4": 0.25, "val/pass@4": 0.75, "val/maj@4": 0.5}
    record = {
        "status": "finished",
        "model": "embedded:tiny",
        "run": None,
        "benchmarks": {"arithmetic": {"T=1": {"metrics": figures, "samples_per_prompt": 4}}},
    }
    (scored / "eval.json").write_text(json.dumps(record))
    write_problems(scored, {"T=1": base}, 0)
    return folder / "runs"


def test_a_full_report_has_all_figures_in_one_file_without_network(tmp_path: Path) -> None:
    everything(tmp_path)
    code, page = reported(
        tmp_path, x="alpha", scatter={"x": "val/avg@4", "y": "val/quality"}, title="T & C",
        note="<b>mine</b>", evaluations=[str(tmp_path / "scored")], panels="seed",
    )  # fmt: skip
    assert code == 0
    kinds = {"curves", "ladder", "frontier", "pass_at_k", "convergence"}
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == kinds
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == len(kinds)
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "<title>T &amp; C</title>" in page
    assert "&lt;b&gt;mine" in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Verdicts", "Curves", "Final figures", "Evaluations",
                      "Evidence of convergence", "What was run", "How to reproduce"]  # fmt: skip
    assert "0123456789-dirty" in page
    assert "run_dir=" not in page, "a command to reproduce does not name a place"
    assert "base tiny, T=1" in (tmp_path / "out" / "table.md").read_text()


def test_the_table_holds_mean_sd_and_interval_and_results_one_row_a_run(tmp_path: Path) -> None:
    everything(tmp_path)
    reported(tmp_path, runs=[str(tmp_path / "runs")])
    rows = {r["group"]: r for r in results(tmp_path, "table.csv")}
    assert list(rows)[:2] == ["base, T=1", "base, T=0.5"]
    powerflow = rows["powerflow α=4"]
    # finals of the seeds are .25 + .25 and .25 + .5; problems stay .25, .5, 0, .25 plus .375
    assert float(powerflow["avg@4_mean"]) == pytest.approx(0.625)
    assert float(powerflow["avg@4_sd"]) == pytest.approx(0.25 / 2**0.5, rel=1e-4)
    assert 0.375 <= float(powerflow["avg@4_low"]) < 0.56
    assert 0.69 < float(powerflow["avg@4_high"]) <= 0.875
    found = results(tmp_path)
    assert [(r["strategy"], r["seed"]) for r in found] == [
        ("powerflow", "0"), ("powerflow", "1"), ("tb_traj", "0"), ("tb_traj", "1"),
    ]  # fmt: skip
    first = found[0]
    assert (first["run"], first["torch"], first["wall_s"]) == ("powerflow0", "2.13.0", "12.5")
    assert (first["headline"], first["peak"], first["peak_refill"]) == ("pass@1", "0.5", "2")
    assert (first["base_avg@4"], first["final_avg@4"]) == ("0.25", "0.5")


def test_a_run_stopped_before_its_first_evaluation_has_no_final_figures(tmp_path: Path) -> None:
    curves = {PASS: [0.2], "rollout/length_mean": [20.0]}
    make_run(tmp_path / "early", curves, status="interrupted")
    make_run(tmp_path / "whole", {PASS: [0.2, 0.2]}, seed=1)
    reported(tmp_path)
    early, whole = results(tmp_path)
    assert (early["base_pass@1"], early["final_pass@1"]) == ("0.2", "")
    assert whole["final_pass@1"] == "0.2", "a finished run may end where it began"


def test_a_last_evaluation_that_was_cut_off_is_not_the_final_one(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "a", problems={"T=1": {"a": 0.0, "b": 0.0}, "final": {"a": 1, "b": 1}}
    )
    with (run / "problems.csv").open("a") as file:
        file.write("9,T=1,a,0.5\n9,T=1,b,0.")
    (read,), _ = read_runs([str(tmp_path)])
    final = read.problems.final() if read.problems else None
    assert final is not None
    assert final.column("avg@4").tolist() == [1.0, 1.0]


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    for wrong, words in (
        ({"x": "alpah"}, "did you mean alpha"),
        ({"scatter": {"x": PASS}}, "scatter"),
        ({"runs": []}, "name run folders"),
        ({"group_by": ["nothing"]}, "nothing"),
        ({"panels": [{"name": "a"}]}, "panels"),
    ):
        with pytest.raises(ConfigError, match=words):
            reported(tmp_path, **wrong)


def test_three_hundred_runs_are_reported_in_seconds(tmp_path: Path) -> None:
    names = [f"train/m{i}" for i in range(36)] + ["rollout/length_mean", "rollout/repetition"]
    curves = {n: [0.123456789012 + r for r in range(61)] for n in [PASS, "val/avg@4", *names]}
    scores = {str(p): p % 5 / 4 for p in range(128)}
    first = make_run(tmp_path / "all" / "000", curves, problems={"T=1": scores, "final": scores})
    config = (first / "config.yaml").read_text()
    for i in range(1, 300):
        folder = shutil.copytree(first, tmp_path / "all" / f"{i:03}")
        changed = config.replace("alpha: 4.0", f"alpha: {2 + i % 20}")
        (folder / "config.yaml").write_text(changed.replace("seed: 0", f"seed: {i}"))
    start = time.process_time()  # other processes of the machine do not count
    code, _ = reported(tmp_path / "all", output=str(tmp_path / "all" / "out"))
    assert code == 0
    assert len(results(tmp_path / "all")) == 300
    assert time.process_time() - start < 15


def test_a_greedy_decoding_stands_under_avg_and_killed_evaluations_are_named(
    tmp_path: Path,
) -> None:
    make_run(tmp_path / "a")
    whole, killed = tmp_path / "ev" / "whole", tmp_path / "ev" / "killed"
    for folder in (whole, killed):
        folder.mkdir(parents=True)
        write_problems(folder, {"T=1": {"a": 0.5}}, 0)
    decodings = {
        "T=1": {"metrics": {"val/avg@4": 0.5, "val/pass@4": 1.0, "val/pass@1": 0.5},
                "samples_per_prompt": 4},
        "greedy": {"metrics": {"val/pass@1": 0.75, "val/avg@1": 0.75}, "samples_per_prompt": 1},
    }  # fmt: skip
    record = {"model": "/models/some-model", "benchmarks": {"arithmetic": decodings}}
    (whole / "eval.json").write_text(json.dumps(record))
    _, page = reported(tmp_path, evaluations=[str(tmp_path / "ev")])
    assert "killed: no eval.json" in page
    assert "whole: unfinished (still running, or killed)" in page
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| | samples | avg@4 | pass@4 |" in table
    assert "| some-model, greedy | 1 | 0.750 | - |" in table


def test_several_benchmarks_of_an_evaluation_stand_apart(tmp_path: Path) -> None:
    folder = tmp_path / "ev"
    folder.mkdir()
    both = {
        name: {"T=1": {"metrics": {"val/avg@4": share, "val/pass@2": 1.0, "val/pass@4": 1.0},
                       "samples_per_prompt": 4}}
        for name, share in (("math500", 0.5), ("aime24", 0.25))
    }  # fmt: skip
    record = {"status": "finished", "model": "/models/m", "benchmarks": both}
    (folder / "eval.json").write_text(json.dumps(record))
    rows = ["math500,0,T=1,1,0.25", "math500,0,T=1,2,0.75", "aime24,0,T=1,1,0.25"]
    (folder / "problems.csv").write_text(
        "\n".join(["benchmark,refill,decoding,prompt_id,avg@4", *rows, ""])
    )
    reported(tmp_path, runs=[], evaluations=[str(folder)])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| | samples | avg@4 | pass@4 |" in table, "of pass@k the one over all samples"
    assert "| m, math500, T=1 | 4 | 0.500 [0.250, 0.750] |" in table
    assert "| m, aime24, T=1 | 4 | 0.250 |" in table
    found, _ = read_evaluations([str(folder)], {})
    lines = pass_lines(found, [])
    assert [(line.label, line.counts[0].tolist()) for line in lines] == [
        ("m, math500, T=1", [1, 3]), ("m, aime24, T=1", [1]),
    ]  # fmt: skip
