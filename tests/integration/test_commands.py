"""The commands of the README, run as typed, in processes of their own."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import command, environment

CONTRACT_FILES = (
    "config.yaml", "overrides.yaml", "metrics.csv", "samples.jsonl", "summary.json",
    "checkpoints/last.ckpt", "export/config.json", "wandb",
)  # fmt: skip
CONTRACT_METRICS = {
    "train": "loss residual_mean residual_abs residual_std log_z log_z_group corr_residual_length "
    "is_weight_mean is_weight_min is_weight_max is_clip_frac ess grad_norm entropy kl_base "
    "inversion_rate lr",
    "rollout": "length_mean length_std truncated_frac format_rate repetition unique_frac "
    "log_p_base_per_token accuracy",
    "val": "avg@4 pass@4 maj@4 length_mean format_rate repetition diversity_semantic "
    "diversity_lexical distinct_n",
    "perf": "rollout_s score_s update_s sync_s tokens_per_s peak_rss_gb",
    "selfcheck": "residual_std_on_base engine_logp_gap",
}


def train(folder: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m powerflow_lit.train ...` from `folder`, without any W&B login."""
    result = command("powerflow_lit.train", overrides, folder=folder, env=environment(folder))
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def only_run(folder: Path) -> Path:
    (summary,) = folder.glob("outputs/**/summary.json")
    return summary.parent


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_fast_run_leaves_the_whole_run_folder(tmp_path: Path, engine: str) -> None:
    printed = train(tmp_path, "debug=fast", f"rollout={engine}").stdout
    run = only_run(tmp_path)
    assert (
        run.relative_to(tmp_path).as_posix().startswith("outputs/arithmetic/tiny/powerflow_alpha4")
    )
    assert all((run / name).exists() for name in CONTRACT_FILES)
    assert "W&B offline" in printed
    assert "trained T=1" in printed
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert summary["strategy"] == "powerflow"
    assert {"start", "rollout", "score", "update", "sync", "eval"} <= summary["phases"].keys()
    assert summary["base"].keys() == summary["final"].keys()
    rows = rows_of(run)
    assert [int(r["step"]) for r in rows] == [0, 1, 2, 3, 4]
    assert [int(r["refill"]) for r in rows] == [0, 1, 1, 2, 2]
    wanted = {
        f"{group}/{name}" for group, names in CONTRACT_METRICS.items() for name in names.split()
    }
    assert wanted <= rows[0].keys()
    assert max(float(r["selfcheck/engine_logp_gap"] or 0) for r in rows) < 1e-4
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {"refill", "prompt", "response", "length", "log_p_base", "log_pf"} <= samples[0].keys()
    assert list(run.glob("wandb/offline-run-*/*.wandb"))

    an_export_opens_like_any_model_and_differs_from_the_base(run / "export")


def an_export_opens_like_any_model_and_differs_from_the_base(export: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "Compute 1 + 2. Put the final answer in \\boxed{}.\nAnswer: \\boxed{3}"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    from powerflow_lit.models.embedded import folder_of

    base = AutoModelForCausalLM.from_pretrained(folder_of("tiny"))
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-4


def test_a_multirun_runs_every_job_in_one_process(tmp_path: Path) -> None:
    overrides, jobs = ("strategy=powerflow,tb_traj", "alpha=2,4", "epsilon=0.1"), 4
    train(tmp_path, "-m", *overrides, "debug=fast", "callbacks.evaluation.max_prompts=16")
    runs = [path.parent for path in tmp_path.glob("multirun/**/summary.json")]
    summaries = [summary_of(run) for run in runs]
    assert len(runs) == jobs
    assert {s["status"] for s in summaries} == {"finished"}
    assert len({(s["strategy"], s["alpha"], s["epsilon"]) for s in summaries}) == jobs
    wandb_ids = {path.name.split("-")[-1] for r in runs for path in r.glob("wandb/offline-run-*")}
    assert len(wandb_ids) == jobs, "each job has a W&B run of its own"


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        "strategy=la_tb,tb_token,tb_token_per_token,rl_traj,rl_token",
        "log_z=head,group,group_loo,ema,fixed",
        "strategy.objective.weight.kind=none,seq_geo,token",
    ],
)
def test_every_choice_trains(tmp_path: Path, choices: str) -> None:
    few = "callbacks.evaluation.max_prompts=16"  # it is training that is claimed here
    train(tmp_path, "-m", choices, "debug=fast", "rollout=hf", "logger=none", few)
    runs = [path.parent for path in tmp_path.glob("multirun/**/summary.json")]
    assert len(runs) == choices.count(",") + 1
    for run in runs:
        assert summary_of(run)["status"] == "finished"
        steps = [r for r in rows_of(run) if r["train/loss"]]
        assert len(steps) == 4
        assert all(float(r["train/grad_norm"]) > 0 for r in steps)
        assert sum(float(r["train/skipped_steps"]) for r in steps) == 0


def test_an_off_policy_annealed_run_keeps_old_refills_and_weighs_them(tmp_path: Path) -> None:
    few = "callbacks.evaluation.max_prompts=16"
    off_policy = ("buffer.max_staleness=2", "buffer.updates_per_refill=4", "refills=3", few)
    chosen = ("alpha_schedule=anneal", "log_z=group", "optimizer.lr=2e-3")
    train(tmp_path, "debug=fast", "rollout=hf", "logger=none", *off_policy, *chosen)
    rows = rows_of(only_run(tmp_path))
    assert [int(r["step"]) for r in rows] == list(range(13))
    alphas = [float(r["train/alpha"]) for r in rows if r["train/alpha"]]
    assert alphas[0] == 1.0
    assert alphas[-1] == 4.0
    last = rows[-1]
    assert float(last["train/ess"]) < 0.999, "stale trajectories have unequal raw weights"
    assert 0.8 <= float(last["train/is_weight_min"]) <= float(last["train/is_weight_max"]) <= 1.2001


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    short = ("refills=1", "callbacks.evaluation.max_prompts=1")
    train(tmp_path, "debug=fast", "rollout=hf", "logger=none", "run_dir=mine", *short)
    again = train(tmp_path, "debug=fast", "rollout=hf", "run_dir=mine", check=False)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
