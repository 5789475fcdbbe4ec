"""What the front door looks at beside the configuration: signatures, folders, the engine."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from powerflow_lit import schedules
from powerflow_lit.config import engines, targets
from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.launching import TRACEBACKS
from powerflow_lit.config.places import check_writable
from powerflow_lit.errors import in_one_line, line_of
from powerflow_lit.log_z import EmaLogZ, GroupLogZ, HeadLogZ
from powerflow_lit.models.folders import context_of, has_chat_template
from powerflow_lit.objectives import BalanceObjective, ImportanceWeight, tb_token_mismatch
from powerflow_lit.preflight import light_parts
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.tasks.creative import Creative
from powerflow_lit.tasks.reasoning import Reasoning
from tests.unit.test_config import checked


def name_of(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"


@pytest.mark.parametrize(
    "target",
    [BalanceObjective, ImportanceWeight, tb_token_mismatch, HeadLogZ, EmaLogZ, HfEngine, Creative,
     Reasoning, schedules.anneal],
)  # fmt: skip
def test_a_signature_read_from_source_is_the_one_that_python_sees(
    target: Callable[..., Any],
) -> None:
    found = targets.signature_of(name_of(target))
    assert found is not None
    assert found.names == tuple(inspect.signature(target).parameters)
    assert not found.is_open


def test_signatures_of_reexported_and_inherited_classes_are_found() -> None:
    assert targets.signature_of("powerflow_lit.objectives.BalanceObjective") == (
        targets.signature_of(name_of(BalanceObjective))
    )
    assert targets.signature_of(name_of(GroupLogZ)) == targets.Signature((), is_open=False)
    trainer = targets.signature_of("lightning.Trainer")
    assert trainer is not None
    assert {"accelerator", "precision", "max_epochs"} <= set(trainer.names)


def test_a_target_of_ones_own_is_read_too_and_an_unreadable_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_the_test.py").write_text(
        "raise SystemExit('imported')\n"
        "def scored(inputs, *, alpha, power): ...\n"
        "def anything(inputs, **others): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"unknown key 'a\.b\.powr': did you mean a\.b\.power\?"):
        targets.check_targets({"a": {"b": {"_target_": "mine_of_the_test.scored", "powr": 1}}})
    targets.check_targets({"_target_": "mine_of_the_test.anything", "powr": 1})
    targets.check_targets({"_target_": "mine_of_the_test.nowhere", "powr": 1})
    targets.check_targets({"_target_": "no_such_package.thing", "powr": 1})
    assert "mine_of_the_test" not in sys.modules


OWN_CLASSES = """
import abc, dataclasses, functools, typing
import attrs
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, overload
T = TypeVar("T")
def adding(function):
    def called(*, extra, **others): return function(**others)
    return called
def adding_to(cls):
    cls.__init__ = lambda self, *, extra: None
    return cls
class Meta(type):
    def __call__(cls, *, extra): return super().__call__()
class Base:
    def __init__(self, *, rate): ...
class Log: ...
class Mixed(Base, Log): ...
@dataclass
class A: a: int
@dataclass
class B: b: int
@dataclass
class AB(A, B): c: int
class Overloaded:
    @overload
    def __init__(self, *, a: int): ...
    @overload
    def __init__(self, *, b: int): ...
    def __init__(self, **others): ...
class New:
    def __new__(cls, *, a): return super().__new__(cls)
class OfNew(New): ...
@adding
def decorated(*, rate): ...
@adding_to
class Decorated: ...
class DecoratedInit:
    @adding
    def __init__(self, *, rate): ...
@attrs.define
class Attrs: a: int
class WithMeta(metaclass=Meta): ...
class OfMeta(WithMeta):
    def __init__(self): ...
class Row(NamedTuple): a: int
class Registered:
    def __init_subclass__(cls, **keys): adding_to(cls)
class OfRegistered(Registered): ...
class Assigned:
    __init__ = Base.__init__
class Rebound: ...
Rebound = adding_to(Rebound)
@dataclass(init=False)
class NoInit(A): ...
# that are still told
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(A): d: int = 0
class Abstract(Base, abc.ABC, Generic[T], metaclass=abc.ABCMeta): ...
@functools.cache
def cached(rate): ...
"""


def test_only_classes_whose_parameters_are_sure_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_classes.py").write_text(OWN_CLASSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    unsure = (
        "Mixed AB Overloaded New OfNew decorated Decorated DecoratedInit Attrs WithMeta OfMeta "
        "Row OfRegistered Assigned Rebound NoInit"
    )
    for name in unsure.split():
        assert targets.signature_of(f"own_classes.{name}") is None, name
    sure = {"Fields": ("a", "d"), "Abstract": ("rate",), "cached": ("rate",), "Log": ()}
    for name, parameters in sure.items():
        found = targets.signature_of(f"own_classes.{name}")
        assert found == targets.Signature(parameters, is_open=False), name


def test_ranges_by_a_parameters_name_hold_for_our_own_classes_only() -> None:
    with pytest.raises(ConfigError, match=r"log_z\.rate=5\.0"):
        checked("log_z=ema", "log_z.rate=5.0")
    mine = ("log_z._target_=mine.RunningLogZ", "alpha_schedule._target_=mine.steps")
    theirs = checked("log_z=ema", "log_z.rate=5.0", "+alpha_schedule.share=high", *mine)
    assert theirs.log_z["rate"] == 5.0


def test_a_writable_place_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable("run_dir", str(tmp_path / "a" / "b" / "c"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    check_writable("run_dir", str(tmp_path / "kept"))
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "file"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"run_dir=.*{place}: cannot be written to \(.+\)"):
        check_writable("run_dir", str(tmp_path / place))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("entries", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, None),
        ({"text_config": {"max_position_embeddings": 2048}}, 2048),
        ({"max_position_embeddings": 32768, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        }}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
        }}, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}, 4096),
    ],
)  # fmt: skip
def test_the_context_is_what_the_models_config_says(
    tmp_path: Path, entries: dict[str, Any], context: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert context_of(tmp_path) == context


def test_a_chat_template_is_found_in_either_of_its_places(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert not has_chat_template(tmp_path)
    config.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_chat_template(tmp_path)
    config.write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)


def test_a_vllm_of_another_version_is_warned_of_and_other_engines_never_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm, hf = ({"_target_": f"powerflow_lit.rollout.{name}"} for name in ("VllmEngine", "hf.Hf"))
    for version, warned in (("0.32.1", False), ("0.34.0", True), ("0.31.2", True)):
        monkeypatch.setattr(engines, "vllm_version", lambda version=version: version)
        assert (engines.engine_warning(vllm) is not None) == warned
        assert engines.engine_warning(hf) is None
    assert "vLLM 0.31.2 is installed, tried is >=0.32,<0.34" in str(engines.engine_warning(vllm))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy=rl_traj", "strategy.objective.kl=k3"), "strategy=rl_traj: 'k3' is none of"),
        (("strategy=tb_token", "strategy.objective.mismatch.reading=powr"), "reading 'powr'"),
        (("+strategy.calibrate.scale=length_mean",), "unexpected keyword argument 'scale'"),
        (("~log_z.width",), "log_z: .*missing 1 required keyword-only argument: 'width'"),
        (("task.build.train_size=8",), "has 8 training prompts, but .*refill=16 are needed"),
        (("task.build.eval_size=0",), "no evaluation prompts"),
    ],
)
def test_values_that_are_read_only_when_called_are_refused_before_a_model_loads(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        light_parts(checked(*overrides))


FAULTY = """
import torch
class Fault:
    def __init__(self): {}["missing"]
class Narrow:
    def __init__(self, rate=2.0): raise ValueError("bad rate")
class Objective:
    made = []
    def __init__(self, fault=None):
        self.calls, self.fault = [], fault
        self.made.append(self)
    def __call__(self, inputs, *, alpha, **numbers):
        self.calls.append(torch.is_grad_enabled())
        if self.fault:
            raise {"KeyError": KeyError, "TypeError": TypeError}[self.fault]("of the trial")
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "faulty_of_the_test.py").write_text(FAULTY)
    (tmp_path / "unimportable_of_the_test.py").write_text("{}['missing']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("faulty_of_the_test", None)


def started(target: str) -> None:
    """What an entry point does with a class."""
    config = checked()
    config.log_z = {"_target_": target}
    with in_one_line():
        light_parts(config)


@pytest.mark.usefixtures("faulty")
def test_a_fault_in_a_class_of_ones_own_is_a_traceback_and_a_wrong_argument_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InstantiationException) as raised:
        started("faulty_of_the_test.Fault")
    assert isinstance(raised.value.__cause__, KeyError)
    assert line_of(raised.value) == "KeyError: 'missing'"
    with pytest.raises(InstantiationException):
        started("unimportable_of_the_test.LogZ")
    for name, line in {
        "faulty_of_the_test.Narrow": "error: log_z: ValueError: bad rate",
        "faulty_of_the_test.Nowhere": "error: log_z: Error loading 'faulty_of_the_test.Nowhere'",
        "nowhere_of_the_test.LogZ": "error: log_z: Error loading 'nowhere_of_the_test.LogZ'",
    }.items():
        with pytest.raises(SystemExit):
            started(name)
        assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("values", [{"accelerator": "tpu"}, {"strategy": "nowhere"}])
def test_what_lightnings_trainer_refuses_is_a_line(
    capsys: pytest.CaptureFixture[str], values: dict[str, str]
) -> None:
    with pytest.raises(SystemExit), in_one_line():
        instantiate({"_target_": "lightning.Trainer", **values})
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.usefixtures("faulty")
def test_who_asked_for_tracebacks_gets_all_but_our_own_refusals() -> None:
    asked = TRACEBACKS.set(True)
    try:
        with pytest.raises(InstantiationException):
            started("faulty_of_the_test.Narrow")
        with pytest.raises(SystemExit), in_one_line():
            light_parts(checked("task.build.eval_size=0"))
    finally:
        TRACEBACKS.reset(asked)


@pytest.mark.usefixtures("faulty")
def test_an_objective_is_tried_on_another_instance_without_gradients() -> None:
    import faulty_of_the_test as mine  # type: ignore[import-not-found]

    def objective(**values: str) -> Any:
        config = checked()
        config.strategy.objective = {"_target_": "faulty_of_the_test.Objective", **values}
        return light_parts(config).objective

    kept = objective()
    (tried,) = [made for made in mine.Objective.made if made is not kept]
    assert (kept.calls, tried.calls) == ([], [False, False])
    assert objective(fault="KeyError").calls == []
    with pytest.raises(ConfigError, match="strategy=powerflow: of the trial"):
        objective(fault="TypeError")
