"""Run folders in; one page of verdicts, curves, tables and evidence out.

python -m powerflow_lit.report 'runs=[outputs/arithmetic/tiny]' output=report
python -m powerflow_lit.report 'runs=[multirun/study]' x=alpha
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.launching import launch, typed_overrides
from powerflow_lit.config.schema_tools import ReportConfig
from powerflow_lit.errors import in_one_line


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="report")
def _main(cfg: DictConfig) -> None:
    typed_in = typed_overrides()
    with in_one_line():
        config = typed(cfg, ReportConfig)
        sys.exit(run(config, shlex.join(["python", "-m", "powerflow_lit.report", *typed_in])))


def run(config: ReportConfig, command: str) -> int:
    """The report written and printed; returns the exit code (2: nothing to report on).

    Raises:
        ConfigError: a setting that cannot work.
    """
    from powerflow_lit.reporting.study import study_of  # draws, and so is heavy
    from powerflow_lit.reporting.write import write

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
    launch(_main, "report")


if __name__ == "__main__":
    main()
