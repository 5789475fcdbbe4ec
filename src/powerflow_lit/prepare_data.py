"""Rebuild the training set of mathematical questions: filtered, sampled by seed, hashed.

python -m powerflow_lit.prepare_data                           # from NuminaMath-CoT on the hub
python -m powerflow_lit.prepare_data source.path=NM_20K_1010.parquet output=data/nm18k.parquet
python -m powerflow_lit.train task=reasoning task.build.train.path=data/nm18k.parquet
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.launching import launch
from powerflow_lit.config.places import check_writable
from powerflow_lit.config.schema_tools import PrepareDataConfig
from powerflow_lit.errors import in_one_line
from powerflow_lit.terminal import note_while, wide_console


def check(config: PrepareDataConfig) -> None:
    """Refuse what cannot work before the source is read.

    Raises:
        ConfigError: the output is no parquet file, or is the source; a size below 1.
    """
    output = Path(config.output).expanduser()
    if output.suffix != ".parquet":
        raise ConfigError(f"output={config.output}: must end in .parquet")
    if output.resolve() == Path(config.source.path).expanduser().resolve():
        raise ConfigError(f"output={config.output}: is the source itself, choose another file")
    if config.size is not None and config.size < 1:
        raise ConfigError(f"size={config.size}: must be 1 or more, or null for all")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="prepare_data")
def _main(cfg: DictConfig) -> None:
    with in_one_line():
        config = typed(cfg, PrepareDataConfig)
        check(config)
        check_writable("output", str(Path(config.output).expanduser().parent))
        with note_while("importing datasets"):
            from powerflow_lit.data_preparation import prepare, table_of
        manifest = prepare(config)
    print(config.source.path)
    wide_console().print(table_of(manifest))
    print(f"length of solutions: {manifest['solution_length']}")
    print(f"sha256 of the questions: {manifest['sha256']}")
    print(f"written to {config.output} and {config.output}.json")


def main() -> None:
    """Console script `powerflow-prepare-data`."""
    launch(_main, "prepare_data")


if __name__ == "__main__":
    main()
