"""Sample a model on a task's evaluation prompts and score what it says.

python -m powerflow_lit.evaluate run=outputs/...               # a run's policy
python -m powerflow_lit.evaluate model=tiny task=arithmetic    # a base, several decodings
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, TaskID

from powerflow_lit.assembly import build_engine, build_model
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.fallback import with_available_engine
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.console import metrics_table, quiet, wide_console
from powerflow_lit.errors import USER_ERRORS, root_cause
from powerflow_lit.evaluation import Decoding, EvaluationSettings, evaluate, val_metrics
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.prompting import encode_prompts
from powerflow_lit.resume import checkpoint_of, load_policy
from powerflow_lit.run_folder import append_problems, git_commit, versions


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics by decoding, also written to `evaluation.json` in the output folder."""
    model, tokenizer = build_model(config.model)
    if config.run is not None and not (Path(config.run) / "export").is_dir():
        model = load_policy(model, Path(config.run))
    task = instantiate(config.task.build)
    prompts = task.eval_prompts()
    ids = encode_prompts(tokenizer, prompts, config.model.prompt_route)  # type: ignore[arg-type]
    settings = EvaluationSettings(
        config.samples_per_prompt, config.rollout.max_new_tokens, config.seed
    )
    engine = build_engine(
        config.rollout.engine,
        config.model,
        model,
        tokenizer,
        max_model_len=max(map(len, ids.values())) + config.rollout.max_new_tokens,
        seed=config.seed,
    )
    results: dict[str, dict[str, float]] = {}
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("evaluation.json", "problems.csv"):
        (output / name).unlink(missing_ok=True)
    try:
        engine.sync(policy_weights(model), 0)
        with Progress(transient=True) as progress:
            for chosen in config.decodings:
                decoding = Decoding(chosen.temperature, chosen.min_p)
                total = len(prompts) * (
                    1 if decoding.temperature == 0 else config.samples_per_prompt
                )
                bar = progress.add_task(decoding.name, total=total)
                scores = evaluate(
                    engine,
                    tokenizer,
                    task,
                    prompts,
                    [ids[p.id] for p in prompts],
                    decoding,
                    settings,
                    partial(_advance, progress, bar),
                )
                results[decoding.name] = val_metrics(scores)
                append_problems(output, 0, decoding.name, [p.id for p in prompts], scores)
    finally:
        engine.close()
    record = {
        "task": config.task.name,
        "run": config.run,
        "model": config.model.path,
        "samples_per_prompt": config.samples_per_prompt,
        "seed": config.seed,
        "results": results,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    (output / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _advance(progress: Progress, bar: TaskID, done: int, tokens: int) -> None:
    progress.update(bar, completed=done)


def _of_run(cfg: DictConfig) -> DictConfig:
    """With `run=`: the run's own model and task in place of the defaults."""
    if cfg.run is None:
        return cfg
    folder = Path(cfg.run)
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"run={cfg.run}: no run folder there (no config.yaml)")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    if (folder / "export").is_dir():
        saved["model"]["path"] = str(folder / "export")
    elif checkpoint_of(folder) is None:
        raise ConfigError(f"run={cfg.run}: neither an export/ nor a checkpoint there yet")
    task = saved["task"] | {"max_new_tokens": saved["rollout"]["max_new_tokens"]}
    return OmegaConf.merge(cfg, {"model": saved["model"], "task": task})  # type: ignore[return-value]


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="evaluate")
def _main(cfg: DictConfig) -> None:
    try:
        quiet()
        config = typed(with_available_engine(_of_run(cfg)), EvaluateConfig)
        record = run(config)
    except USER_ERRORS as error:
        print(f"error: {root_cause(error)}", file=sys.stderr)
        sys.exit(2)
    title = f"{record['task']}: {record['model']}"
    wide_console().print(metrics_table(title, record["results"]))
    print(f"written to {Path(config.output) / 'evaluation.json'}")


def main() -> None:
    """Console script `powerflow-evaluate`."""
    _main()


if __name__ == "__main__":
    main()
