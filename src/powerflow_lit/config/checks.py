"""Refuses a wrong configuration in one line; looks at nothing but the configuration itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from powerflow_lit.config.combinations import check_combinations, check_monitor
from powerflow_lit.config.ranges import (
    check_evaluate_ranges,
    check_finetune,
    check_finite,
    check_train_ranges,
)
from powerflow_lit.config.rules import ConfigError as ConfigError
from powerflow_lit.config.rules import nearest, one_of
from powerflow_lit.config.schema import EvaluateConfig, TrainConfig
from powerflow_lit.config.targets import check_targets

Schema = TypeVar("Schema")
KINDS = {
    "Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "str": "text",
    "float": "a number", "int": "a whole number", "bool": "true or false",
}  # fmt: skip


def typed(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """The resolved configuration as a typed object.

    Raises:
        ConfigError: an unknown key (also one forced in with `+`, and beside a `_target_`), a wrong
            type, a missing value, a number that is not finite.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error, schema)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_wrong_value(error, cfg)) from error
    check_finite(plain)
    check_targets(plain)
    return found  # type: ignore[return-value]


def train_config(cfg: DictConfig) -> TrainConfig:
    """The checked configuration of a training run.

    Raises:
        ConfigError: see `typed`; also values out of range or in contradiction.
    """
    _check_kind(cfg)
    config = typed(cfg, TrainConfig)
    check_finetune(config.finetune)  # before the learning rate that it scales
    check_train_ranges(config)
    check_combinations(config)
    check_monitor(config)
    return config


def evaluate_config(cfg: DictConfig) -> EvaluateConfig:
    """The checked configuration of an evaluation.

    Raises:
        ConfigError: see `typed`; also values out of range.
    """
    _check_kind(cfg)
    config = typed(cfg, EvaluateConfig)
    check_evaluate_ranges(config)
    return config


def as_dict(config: Any) -> Mapping[str, Any]:
    """A typed configuration as plain containers, for config.yaml."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)  # type: ignore[return-value]


def _check_kind(cfg: DictConfig) -> None:
    """Before alpha's default is looked up by it."""
    kind = OmegaConf.select(cfg, "model.kind")
    if kind is not None:
        one_of("model.kind", kind, ("base", "instruct"))


def _unknown_key(error: ConfigKeyError, schema: type) -> str:
    wrong = str(error.full_key or error.key)
    parent, _, leaf = wrong.rpartition(".")
    node: Any = OmegaConf.structured(schema)
    if parent:  # below a name that the user chose the schema holds nothing, but the error knows
        node = OmegaConf.select(node, parent) or OmegaConf.structured(error.object_type)
    known = list(node.keys())
    close = nearest(leaf, known)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{close}?" if close else f"known: {', '.join(map(str, known))}"
    return f"unknown key '{wrong}': {hint}"


def _wrong_value(error: OmegaConfBaseException, cfg: DictConfig) -> str:
    """An error of OmegaConf in our words; its own first line where we have none."""
    where = str(getattr(error, "full_key", None) or "configuration")
    said = str(error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{where} is missing: set {where}="
    if isinstance(error, InterpolationKeyError):
        return f"{where}: {said[0].lower()}{said[1:]}"
    if isinstance(error, InterpolationResolutionError):
        return f"{where}: {said.partition('resolving interpolation: ')[2] or said}"
    kind = re.search(r"could not be converted to (\w+)|for field of type '(\w+)'", said)
    value = OmegaConf.select(cfg, where) if re.fullmatch(r"[\w.\[\]]+", where) else None
    if kind is not None and (name := kind[1] or kind[2]) in KINDS:
        shown = "null" if value is None else value if value != "" else "''"
        return f"{where}={shown}: must be {KINDS[name]}"
    if "is not a ListConfig" in said:
        return f"{where}={value}: must be a list, as in {where}=[{value}]"
    if said.startswith("Cannot assign"):
        return f"{where}={value}: must be a group of keys, not a value"
    return f"{where}: {said}"
