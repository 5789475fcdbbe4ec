"""Sample a model on evaluation prompts and score what it says.

python -m powerflow_lit.evaluate run=outputs/...               # a run's policy
python -m powerflow_lit.evaluate model=tiny task=arithmetic    # a base, several decodings
python -m powerflow_lit.evaluate model=hf model.path=<folder> benchmark=paper benchmark_dir=<folder>
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from powerflow_lit import run_folder
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, evaluate_config
from powerflow_lit.config.engines import check_engine, engine_warning
from powerflow_lit.config.launching import launch, typed_overrides
from powerflow_lit.config.places import check_writable
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.errors import in_one_line
from powerflow_lit.garbage import imports_left_out
from powerflow_lit.models.folders import resolve_path
from powerflow_lit.terminal import note_while

CALIBRATION_FAILED = 3  # exit code
STOP_SIGNALS = ("SIGTERM", "SIGUSR1")  # beside Ctrl-C
GOES_ON = "the same command goes on from what was kept"


def _of_run(cfg: DictConfig, typed_overrides: Sequence[str]) -> DictConfig:
    """With `run=`: the run's own model and task in place of the defaults, and its alpha.

    What was typed of either still counts.
    """
    if cfg.run is None:
        return cfg
    folder = Path(cfg.run)
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"run={cfg.run}: no run folder there (no config.yaml)")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    if (export := run_folder.export_of(folder)) is not None:
        saved["model"] |= {"path": str(export), "revision": None}
    elif not any((folder / "checkpoints").glob("*.ckpt")):
        raise ConfigError(f"run={cfg.run}: neither an export/ nor a checkpoint there yet")
    task = saved["task"] | {"max_new_tokens": saved["rollout"]["max_new_tokens"]}
    with open_dict(cfg):
        cfg.task = task  # as a whole: another task is built from other keys
    brought = {"model": saved["model"]}
    if OmegaConf.is_interpolation(cfg, "alpha"):  # not typed
        found = (run_folder.read_summary(folder) or {}).get("automatic_alpha")  # by a target
        brought["alpha"] = (found or saved)["alpha"]
    own = [o for o in typed_overrides if o.startswith(("model.", "task."))]
    return OmegaConf.merge(cfg, brought, OmegaConf.from_dotlist(own))  # type: ignore[return-value]


def announce(config: EvaluateConfig) -> None:
    """What is about to be sampled and scored, in a line."""
    model = config.run or config.model.path
    on = ", ".join(config.benchmarks) or config.task.name
    print(f"{model} on {on}: {config.samples_per_prompt} samples a prompt, into {config.output}")
    sys.stdout.flush()
    if warning := engine_warning(config.rollout.engine):
        print(warning, file=sys.stderr)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="evaluate")
def _main(cfg: DictConfig) -> None:
    with in_one_line():
        config = evaluate_config(_of_run(cfg, typed_overrides()))
        check_engine(config.rollout.engine)
        resolve_path(config.model.path)
        check_writable("output", config.output)
        announce(config)
        record = _record(config)
    from powerflow_lit.evaluating.calibration import PASS

    judged = record["calibration"]
    if judged is not None and judged["verdict"] != PASS:
        sys.exit(CALIBRATION_FAILED)


def _record(config: EvaluateConfig) -> dict[str, Any]:
    """The evaluation, with its tables printed; what eval.json says at the end."""
    with note_while("importing transformers"), imports_left_out():
        from powerflow_lit.benchmarking import run
        from powerflow_lit.console import quiet, wide_console
        from powerflow_lit.disk import explained
        from powerflow_lit.evaluating.tables import tables_of
        from powerflow_lit.interrupt import Stopped, StopSignals

    quiet()
    try:
        with StopSignals(STOP_SIGNALS), explained(lambda: "Free some space; " + GOES_ON):
            record = run(config)
    except Stopped:
        print(f"interrupted; {GOES_ON} with output={config.output}", file=sys.stderr)
        raise
    console = wide_console()
    for table in tables_of(record):
        console.print(table)
    for note in record["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    print(f"written to {Path(config.output) / 'eval.json'}")
    return record


def main() -> None:
    """Console script `powerflow-evaluate`."""
    launch(_main, "evaluate")


if __name__ == "__main__":
    main()
