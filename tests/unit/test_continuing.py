"""Which run `resume=auto` goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, as_dict, train_config
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.continuing import find_unfinished
from powerflow_lit.run_folder import export_of, held, write_configs, write_summary


def config(run_dir: Path, *overrides: str) -> TrainConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return train_config(compose("train", overrides=[f"run_dir={run_dir}", *overrides]))


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """The folder of an unfinished run of the default configuration."""
    folder = tmp_path / "strategy" / "one"
    write_configs(folder, as_dict(config(folder)), [])
    return folder


def found(twin: Path, *overrides: str, typed: tuple[str, ...] = ()) -> Path:
    return find_unfinished(config(twin.with_name("two"), *overrides), [*overrides, *typed])


def test_without_a_run_dir_the_unfinished_twin_is_taken(twin: Path) -> None:
    assert found(twin) == twin
    assert found(twin, "alpha=3") == twin.with_name("two"), "another configuration is no twin"
    write_summary(twin, {"status": "finished"})
    assert found(twin) == twin.with_name("two")


def test_a_run_dir_that_was_typed_is_taken_whatever_lies_beside_it(twin: Path) -> None:
    assert found(twin, typed=("run_dir=two",)) == twin.with_name("two")


def test_a_twin_that_is_running_is_left_alone(twin: Path) -> None:
    with held(twin):
        assert found(twin) == twin.with_name("two")
        with pytest.raises(ConfigError, match="another process is running in it"), held(twin):
            pass
    assert found(twin) == twin


@pytest.mark.parametrize("content", ["just text", "!python/object:os.system {}", "- a list", ""])
def test_files_that_are_no_configuration_are_passed_over(twin: Path, content: str) -> None:
    other = twin.with_name("theirs")
    other.mkdir()
    (other / "config.yaml").write_text(content)
    assert found(twin) == twin


def test_an_export_counts_until_a_checkpoint_is_newer(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    assert export_of(tmp_path) == tmp_path / "export", "a copied export by itself"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert export_of(tmp_path) is None, "taken up again and not finished"
    write_summary(tmp_path, {"status": "finished"})
    assert export_of(tmp_path) == tmp_path / "export"
