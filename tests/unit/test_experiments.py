"""The commands in the studies' READMEs are ones that the entry points take."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config, typed
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.config.schema_tools import PretrainConfig, ReportConfig
from powerflow_lit.sweep import BasicSweeper

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCHEMAS = {"evaluate": EvaluateConfig, "report": ReportConfig, "pretrain": PretrainConfig}


def commands() -> list[tuple[str, str, list[str]]]:
    """(study, entry point, arguments) of every command in a README's code blocks."""
    found = []
    for readme in sorted(EXPERIMENTS.glob("*/README.md")):
        for block in re.findall(r"^```\n(.*?)^```", readme.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"python -m powerflow_lit\.(\w+) (.*)", line):
                    # which run folder a shell would find is not known here
                    words = [w for w in shlex.split(re.sub(r"run=\$\(.*?\)", "", match[2])) if w]
                    found.append((readme.parent.name, match[1], words))
    return found


def composed_jobs(arguments: list[str]) -> list[str]:
    """The checked jobs of a multirun, as text; Hydra's own overrides are left to Hydra."""
    Plugins.instance()  # as Hydra does before it reads overrides
    own = [a for a in arguments if a != "-m" and not a.startswith("hydra/")]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        fixed = [a for a in own if a.startswith("experiment=")]
        master = compose("train", overrides=fixed, return_hydra_config=True)
        listed = [f"{k}={v}" for k, v in (master.hydra.sweeper.params or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*listed, *own])
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
        return [str(train_config(compose("train", overrides=job))) for job in jobs]


@pytest.mark.parametrize(
    ("study", "entry", "arguments"), commands(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_command_of_a_study_composes(study: str, entry: str, arguments: list[str]) -> None:
    if entry == "train":
        jobs = composed_jobs(arguments)
        assert len(jobs) == len(set(jobs)) > 1
    else:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            typed(compose(entry, overrides=arguments), SCHEMAS[entry])


def test_a_command_of_a_study_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match="experiment/none_such"):
        composed_jobs(["-m", "experiment=none_such"])


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("**/results.csv")), ids=str)
def test_committed_results_name_their_commit(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    if "status" in rows[0]:  # of runs; the exactness study has run.json
        assert all(row["status"] == "finished" and row["git_commit"] for row in rows)
        assert not any("dirty" in row["git_commit"] for row in rows)


def test_every_study_has_a_question_a_command_and_a_figure() -> None:
    for readme in EXPERIMENTS.glob("*/README.md"):
        text = readme.read_text()
        assert text.startswith("# ")
        assert "python " in text
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
        assert pictures
        assert all((readme.parent / picture).is_file() for picture in pictures), readme


def test_layouts_compose_for_the_report() -> None:
    for path in (Path(conf_dir()) / "layout").glob("*.yaml"):
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            config = typed(compose("report", overrides=[f"layout={path.stem}"]), ReportConfig)
        assert config.output.startswith("experiments/"), OmegaConf.to_yaml(config)
