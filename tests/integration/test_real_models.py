"""Options of real models, through the command: 16 bits, checkpointing, estimates, a failed push."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.integration.test_commands import rows_of, summary_of, train

SMALL = ("debug=fast", "model.threads=1", "rollout=hf", "logger=none", "task.build.eval_size=4")


def test_16_bits_train_on_the_cpu_in_full_and_with_an_adapter(tmp_path: Path) -> None:
    rounded = ("rollout.logp_gap_limit=1", "model.gradient_checkpointing=true")
    train(tmp_path, "-m", "trainer.precision=bf16-mixed,bf16-true", *SMALL, *rounded, "study=a")
    adapted = ("model.dtype=bfloat16", "finetune=lora", "run_dir=multirun/b")
    train(tmp_path, *SMALL, *rounded, *adapted)
    runs = [path.parent for path in tmp_path.glob("multirun/**/summary.json")]
    assert len(runs) == 3
    for run in runs:
        assert summary_of(run)["status"] == "finished"
        steps = [r for r in rows_of(run) if r["train/loss"]]
        assert len(steps) == 4
        assert all(float(r["train/grad_norm"]) > 0 for r in steps)
        assert steps[-1]["train/skipped_steps"] == "0.0"
        config = yaml.safe_load((run / "config.yaml").read_text())
        rounded_weights = config["trainer"]["precision"] == "bf16-true" or run.name == "b"
        kept = json.loads((run / "export" / "config.json").read_text())["dtype"]
        assert kept == ("bfloat16" if rounded_weights else "float32")


def test_a_failed_push_costs_no_run_and_says_so(tmp_path: Path) -> None:
    repo = "callbacks.push_to_hub=nobody/nothing"
    result = train(tmp_path, *SMALL, repo, "callbacks.export_dtype=bfloat16", "run_dir=run")
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "finished"
    assert summary["push_to_hub"]["repo"] == "nobody/nothing"
    assert summary["push_to_hub"]["error"]
    line = next(x for x in result.stderr.splitlines() if x.startswith("warning: not pushed"))
    assert "hf upload nobody/nothing run/export" in line
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
