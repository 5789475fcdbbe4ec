"""Starts an entry point: what Hydra would refuse in many lines is refused in one of ours."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from powerflow_lit.config import conf_dir
from powerflow_lit.config.processes import rank_here
from powerflow_lit.config.ranges import SET_BY_THE_RUN
from powerflow_lit.config.rules import ConfigError, listed, nearest
from powerflow_lit.config.secrets import hide_in_output
from powerflow_lit.config.targets import signature_of
from powerflow_lit.mendable import MendableError

FULL_ERROR = "HYDRA_FULL_ERROR"
TRACEBACKS = ContextVar("tracebacks", default=False)  # whether the user asked for them
REFUSED = 2  # exit code
DEFAULTS_OF_OTHERS = ("model", "task")  # groups whose values other groups take up
LISTS_GROUPS = {"--help", "-h", "--hydra-help", "--info", "-i"}
COMPOSITION = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)


def launch(
    main: Callable[[], Any],
    config_name: str,
    *,
    arguments: Callable[[Sequence[str]], list[str]] = list,
) -> None:
    """Runs `main`, a function under `hydra.main`.

    What cannot be composed is one line on stderr and exit code 2; with HYDRA_FULL_ERROR=1 in the
    environment it is Hydra's own traceback. What happens once a job has begun passes through;
    TRACEBACKS tells it whether the user set that variable.

    Args:
        config_name: the entry point's file in conf/, without its ending.
        arguments: turns what was typed into what Hydra shall see.
    """
    hide_in_output()
    plain = FULL_ERROR not in os.environ
    TRACEBACKS.set(not plain)
    if plain:  # Hydra would print its errors and exit with 1; so it raises them
        os.environ[FULL_ERROR] = "1"
    try:
        sys.argv[1:] = arguments(sys.argv[1:])
        check_options(sys.argv[1:])
        with listed_once() if LISTS_GROUPS & set(sys.argv[1:]) else nullcontext():
            main()
    except KeyboardInterrupt:  # before the run itself heeds signals
        sys.exit(128 + signal.SIGINT)
    except MendableError as error:
        refuse(str(error))
    except COMPOSITION as error:
        if not plain or begun(error) or isinstance(error, BrokenPipeError):
            raise
        refuse(explained(error, config_name, sys.argv[1:]))


@contextmanager
def listed_once() -> Iterator[None]:
    """Within, Hydra lists the groups of conf/ from one copy of what it knows.

    Hydra 1.3 copies all of it again for each group that --help names, twice over: most of a second.
    """
    plain, kept = ConfigLoaderImpl._parse_overrides_and_create_caching_repo, {}

    def once(loader: Any, config_name: str | None, overrides: list[str]) -> Any:
        if config_name is not None or overrides:  # a composition, which changes its copy
            return plain(loader, config_name, overrides)
        if loader not in kept:
            kept[loader] = plain(loader, None, [])
        return kept[loader]

    ConfigLoaderImpl._parse_overrides_and_create_caching_repo = once  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl._parse_overrides_and_create_caching_repo = plain  # type: ignore[method-assign]


def typed_overrides() -> list[str]:
    """What was typed for this job; an interpolation in it is the configuration's to resolve."""
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(override) for override in typed]


def refuse(message: str) -> NoReturn:
    """The message in one line on stderr, and exit code 2."""
    where = f"rank {rank_here()}: " if rank_here() else ""
    print(f"error: {where}" + " ".join(message.split()), file=sys.stderr)
    sys.exit(REFUSED)


def begun(error: BaseException) -> bool:
    """Whether an error came from a job, not from the composition of its configuration."""
    return any(frame.name == "run_job" for frame in traceback.extract_tb(error.__traceback__))


def check_options(arguments: Sequence[str]) -> None:
    """Refuse what begins with a dash and is no option of Hydra's.

    Raises:
        ConfigError: with the setting that was probably meant.
    """
    parser = get_args_parser()

    def fail(message: str) -> NoReturn:
        wrong = message.removeprefix("unrecognized arguments: ")
        if wrong == message:
            raise ConfigError(message)
        setting = wrong.split()[0].lstrip("-")
        meant = setting if "=" in setting else f"{setting}=VALUE"
        raise ConfigError(
            f"unknown option {wrong}: settings are typed without dashes, as in {meant} "
            "(--help lists the options)"
        )

    parser.error = fail  # type: ignore[method-assign]
    parser.parse_args(list(arguments))


def explained(error: BaseException, config_name: str, arguments: Sequence[str]) -> str:
    """An error of the composition as one line that names what was typed and what was meant."""
    said = str(error)
    if isinstance(error, MissingConfigException):
        return _missing(error, arguments)
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override), said, arguments)
    if isinstance(error, ConfigCompositionException):
        found = re.match(r"Could not override '([^']+)'", said)
        if found and "@" not in found[1]:
            below = str(getattr(error.__cause__, "full_key", ""))  # of a value that is a mapping
            key = below if below.startswith(f"{found[1]}.") else found[1]
            return unknown_key(key, config_name, arguments)
        if found := re.match(r"Could not delete from config. '([^']+)' does not exist", said):
            return unknown_key(found[1], config_name, arguments)
        if found := re.search(r"An item is already at '([^']+)'", said):
            return f"'{found[1]}' is there already: change it without +, {found[1]}=VALUE"
        if found := re.search(r"Ambiguous value for argument '(.+)'", said):
            return (
                f"{found[1]}: several values: add -m to run each of them (a multirun), or write "
                "a list in brackets"
            )
    if isinstance(error, ValueError) and said.startswith("Config group override must be"):
        wrong = next(filter(_names_no_choice, arguments), "")
        if wrong.startswith("="):
            return f"cannot read '{wrong}': there is no key before the ="
        return f"{wrong}: a group takes the name of a choice"
    return said


def unknown_key(key: str, config_name: str, arguments: Sequence[str]) -> str:
    """What a mistyped key probably meant, as `typed` says it for keys forced in with +."""
    config = _composed(config_name, arguments)
    parent, leaf = _deepest(config, key)
    node = OmegaConf.select(config, parent) if parent else config
    prefix = f"{parent}." if parent else ""
    if not OmegaConf.is_dict(node):
        return f"unknown key '{key}': {parent} is a value, it has no keys below it"
    signature = signature_of(str(node.get("_target_")))
    if parent == "trainer" and leaf in SET_BY_THE_RUN:
        return f"trainer.{leaf}: the run sets it itself; set {SET_BY_THE_RUN[leaf]}"
    if signature is not None and leaf in signature.names:
        return f"'{key}' has no value here yet: add it with +{key}=VALUE"
    known = [str(name) for name in node if str(name) != "hydra" and not str(name).startswith("_")]
    if not parent:
        known += [group for group in _groups() if group not in known]
    if close := nearest(leaf, known):
        rest = key.removeprefix(prefix + leaf)  # below the name that is mistyped
        return f"unknown key '{key}': did you mean {prefix}{close}{rest}?"
    if elsewhere := _elsewhere(config, key.rpartition(".")[2]):
        return f"unknown key '{key}': did you mean {' or '.join(elsewhere)}?"
    return f"unknown key '{key}': known: {listed(known)}"


def _missing(error: MissingConfigException, arguments: Sequence[str]) -> str:
    """A group's choice, or a whole configuration, that no file holds."""
    wanted = str(error.missing_cfg_file)
    if not error.options:
        return f"no configuration {wanted} in {conf_dir()}"
    group, _, choice = wanted.rpartition("/")
    for argument in arguments:  # of experiment=paper/x the group is not experiment/paper
        key, _, value = argument.lstrip("+").partition("=")
        if f"{key}/{value}" == wanted:
            group, choice = key, value
    folder = Path(conf_dir()) / group
    below = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    options = sorted({*error.options, *(path.as_posix() for path in below)})
    leaves = {option.rpartition("/")[2]: option for option in options}
    close = (
        leaves.get(choice) or nearest(choice, options) or leaves.get(nearest(choice, leaves) or "")
    )
    hint = f"did you mean {close}? " if close else ""
    return f"{group}={choice}: no such choice: {hint}there are {listed(options)}"


def _unreadable(override: str, said: str, arguments: Sequence[str]) -> str:
    """A setting that Hydra's grammar cannot read."""
    wrong = f"cannot read '{override}'"
    key, equals, value = override.partition("=")
    if not equals:
        after = list(arguments)[list(arguments).index(override) + 1 :]
        values = [a.lstrip("=") for a in after[:2] if a != "="]
        if ":" in key:
            meant = key.replace(":", "=", 1)
        else:
            meant = f"{key}={values[0] if values and '=' not in values[0] else 'VALUE'}"
        return f"{wrong}: a setting is key=value, without spaces: {meant}"
    if any(value.count(a) != value.count(b) for a, b in ("[]", "{}", "()")):
        return f"{wrong}: a bracket in its value is not closed"
    if value.startswith("="):
        return f"{wrong}: one = is enough: {key}={value.lstrip('=')}"
    if not re.fullmatch(r"[+~]{0,2}[\w./@:-]+", key):
        return f"{wrong}: '{key}' is no name of a setting"
    return f"""{wrong}: put a value with such characters into quotes: '{key}="{value}"'"""


def _names_no_choice(argument: str) -> bool:
    """Whether an override chooses for a group what is no name: nothing, null or a number."""
    key, equals, value = argument.partition("=")
    is_group = key.lstrip("+") in _groups() or not key
    return bool(equals) and is_group and not re.search(r"[A-Za-z]", value.replace("null", ""))


def _composed(config_name: str, arguments: Sequence[str]) -> Any:
    """The configuration with the groups that were chosen; without them where they fail too."""
    groups = _groups()
    chosen = [a for a in arguments if a.partition("=")[0].lstrip("+") in groups and "," not in a]
    for overrides in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(conf_dir(), version_base="1.3"):
                return compose(config_name, overrides=overrides, return_hydra_config=True)
        except COMPOSITION:
            continue
    return OmegaConf.create({})


def _deepest(config: Any, key: str) -> tuple[str, str]:
    """The part of a dotted key that exists, and the name after it."""
    parts = key.split(".")
    for known in range(len(parts) - 1, 0, -1):
        parent = ".".join(parts[:known])
        if OmegaConf.select(config, parent, throw_on_missing=False) is not None:
            return parent, parts[known]
    return "", parts[0]


def _elsewhere(config: Any, name: str) -> list[str]:
    """Keys of that very name in other groups, the shallowest first."""
    found: list[str] = []

    def search(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if str(key) == "hydra":
                continue
            if str(key) == name:
                found.append(prefix + str(key))
            if isinstance(value, Mapping):
                search(value, f"{prefix}{key}.")

    search(OmegaConf.to_container(config, resolve=False), "")
    found.sort(key=lambda key: (key.count("."), key.partition(".")[0] in DEFAULTS_OF_OTHERS))
    return found[:2]


def _groups() -> list[str]:
    """The groups of conf/."""
    return sorted(path.name for path in Path(conf_dir()).iterdir() if path.is_dir())
