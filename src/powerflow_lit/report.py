"""Run folders in; one page of verdicts, curves, tables and evidence out.

python -m powerflow_lit.report 'runs=[outputs/arithmetic/tiny]' output=report
python -m powerflow_lit.report 'runs=[multirun/study]' x=alpha
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema import ReportConfig
from powerflow_lit.config.secrets import hide_in_output
from powerflow_lit.reporting.grouping import COLOURS
from powerflow_lit.reporting.runs import read_runs
from powerflow_lit.reporting.study import study_of
from powerflow_lit.reporting.write import write

__all__ = ["COLOURS", "main", "read_runs"]


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="report")
def _main(cfg: DictConfig) -> None:
    typed_in = list(HydraConfig.get().overrides.task)
    try:
        config = typed(cfg, ReportConfig)
        sys.exit(run(config, shlex.join(["python", "-m", "powerflow_lit.report", *typed_in])))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(config: ReportConfig, command: str) -> int:
    """The report written and printed; returns the exit code (2: nothing to report on).

    Raises:
        ConfigError: a setting that cannot work.
    """
    study = study_of(config)
    output = Path(config.output)
    try:
        table = write(study, output, command)
    except OSError as error:
        raise ConfigError(f"output={config.output}: {error.strerror or error}") from error
    print(table, *(f"warning: {r}" for r in study.remarks), *study.notes, sep="\n")
    print(f"written to {output / 'index.html'}")
    if not study.runs and not study.evaluations:
        print(f"error: no usable run: see {output / 'index.html'}", file=sys.stderr)
        return 2
    return 0


def main() -> None:
    """Console script `powerflow-report`."""
    hide_in_output()
    _main()


if __name__ == "__main__":
    main()
