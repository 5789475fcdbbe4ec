"""The W&B workspace and report, without W&B: what would be sent, and what is refused."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import wandb
from wandb_workspaces.reports.v2 import interface as reports
from wandb_workspaces.workspaces import interface as workspaces
from wandb_workspaces.workspaces import internal as views
from wandb_workspaces.workspaces._run_color_groups import parse_run_color_group_key

from powerflow_lit import dashboard
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema_tools import DashboardConfig
from powerflow_lit.dashboard import save, specification
from powerflow_lit.reporting.grouping import COLOURS
from tests.unit.test_config import choices, composed

PROJECT_NUMBER = 7


def configured(*overrides: str) -> DashboardConfig:
    return typed(composed(*overrides, config_name="dashboard"), DashboardConfig)


def panels(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Panels of a specification by title."""
    if "section" in part["spec"]:
        banks = part["spec"]["section"]["panelBankConfig"]["sections"]
    else:
        grids = [b["metadata"] for b in part["spec"]["blocks"] if "metadata" in b]
        banks = [grid["panelBankSectionConfig"] for grid in grids]
    return {p["config"]["chartTitle"]: p["config"] for bank in banks for p in bank["panels"]}


def without_ids(spec: dict[str, Any]) -> Any:
    """A specification with its random ids numbered in the order of their appearance."""
    text = json.dumps(spec)
    for i, name in enumerate(dict.fromkeys(re.findall(r'"(?:__id__|id)": "(\w+)"', text))):
        text = text.replace(name, f"#{i}")
    return json.loads(text)


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the network was asked")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a save sends; the server's answers are made up."""
    mutations: list[dict[str, Any]] = []

    def answer(_: Any, query: Any, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" not in str(query):
            return {"project": {"internalId": PROJECT_NUMBER}}
        mutations.append({**variables, "spec": json.loads(variables["spec"])})
        return {"upsertView": {"view": {"id": "id", "name": "nw-name-v"}}}

    api = SimpleNamespace(projects=lambda entity: [SimpleNamespace(name="powerflow_lit")])
    monkeypatch.setattr(wandb, "Api", lambda: api)
    for module in (views, reports):
        monkeypatch.setattr(module, "execute_graphql", answer)
    for module in (workspaces, reports):
        monkeypatch.setattr(module, "get_app_url", lambda _: "https://wandb.ai")
    monkeypatch.setattr(dashboard, "has_wandb_login", lambda: True)
    return mutations


def test_a_dry_run_specifies_what_a_save_sends(sent: list[dict[str, Any]]) -> None:
    config = configured("entity=me", "runs.task=arithmetic")
    addresses = save(config)
    assert [address.startswith("https://wandb.ai/me/powerflow_lit") for address in addresses] == [
        True,
        True,
    ]
    assert len(sent) == 2
    dry = specification(config)
    for part, mutation in zip(("workspace", "report"), sent, strict=True):
        expected = without_ids(dry[part]["spec"])
        real = without_ids(mutation["spec"])
        for block in real.get("blocks", []):
            for runset in block.get("metadata", {}).get("runSets", []):
                assert runset["project"].pop("id") == PROJECT_NUMBER
        assert real == expected
        assert {k: mutation[k] for k in ("entityName", "projectName", "displayName")} == {
            k: v for k, v in dry[part].items() if k != "spec"
        }


def test_a_dry_run_asks_neither_network_nor_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setattr(dashboard, "has_wandb_login", refuse)
    assert specification(configured()).keys() == {"workspace", "report"}


@pytest.mark.parametrize("part", ["workspace", "report"])
def test_every_configured_panel_shows_its_metrics_against_refills(part: str) -> None:
    config = configured()
    groups = config.sections.values() if part == "workspace" else [config.report.panels]
    expected = {title: metrics for group in groups for title, metrics in group.items()}
    shown = panels(specification(config)[part])
    assert {title: panel["metrics"] for title, panel in shown.items()} == expected
    assert {panel["xAxis"] for panel in shown.values()} == {"refill"}


def test_noisy_metrics_are_smoothed_and_evaluations_are_not() -> None:
    shown = panels(specification(configured())["workspace"])
    assert shown["loss"]["smoothingWeight"] == 0.6
    assert shown["loss"]["smoothingType"] != "none"
    assert shown["pass@1"]["smoothingType"] == "none"


def test_a_strategy_has_the_colour_of_the_reports_figures() -> None:
    section = specification(configured("alphas=[4]"))["workspace"]["spec"]["section"]
    coloured = {}
    for key, colour in section["customRunColors"].items():
        parsed = parse_run_color_group_key(key)
        assert parsed is not None
        assert parsed["runset_id"] == section["runSets"][0]["id"]
        coloured[tuple(entry["value"] for entry in parsed["path"])] = colour
    expected = {(name,): colour for name, colour in COLOURS.items()}
    assert coloured == expected | {(name, "4"): colour for name, colour in COLOURS.items()}
    assert set(choices("strategy")) <= COLOURS.keys()


def test_the_report_has_all_strategies_in_one_grid_and_then_each_by_itself() -> None:
    report = specification(configured("alphas=[2]"))["report"]["spec"]
    grids = [block["metadata"] for block in report["blocks"] if block["type"] == "panel-grid"]
    shown = [grid["runSets"][0]["filters"]["filters"][0] for grid in grids]
    assert {item["key"]["name"] for item in shown} == {"strategy.value.name"}
    assert [item["value"] for item in shown] == [
        ["tb_traj", "tb_token", "powerflow"], ["tb_traj"], ["tb_token"], ["powerflow"],
    ]  # fmt: skip
    colours = [list(grid["customRunColors"].values()) for grid in grids]
    assert colours[0] == [COLOURS[name] for name in ("tb_traj", "tb_token", "powerflow")]
    assert [colour for grid in colours[1:] for colour in grid] == colours[0]
    places = [
        (panel["layout"]["x"], panel["layout"]["y"])
        for panel in grids[0]["panelBankSectionConfig"]["panels"]
    ]
    assert places == [(0, 0), (8, 0), (16, 0), (0, 6), (8, 6), (16, 6)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), ("entity=null", "dry_run=true")),
        (("entity=me",), ("no W&B key", "wandb login")),
    ],
)
def test_a_save_without_account_is_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(dashboard, "has_wandb_login", lambda: False)
    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(ConfigError) as refusal:
        save(configured(*overrides))
    assert all(word in str(refusal.value) for word in words)


def test_what_wandb_refuses_is_said_in_one_line(
    sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(*_: Any) -> NoReturn:
        raise ValueError("permission denied\nand a page of details")

    monkeypatch.setattr(views, "execute_graphql", forbid)
    with pytest.raises(ConfigError, match=r"^W&B, me/powerflow_lit: permission denied$"):
        save(configured("entity=me"))
    assert sent == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+sections.mine.empty=[]", "panel 'empty'"),
        ("smoothing.train=1", "smoothing.train=1"),
    ],
)
def test_a_panel_that_would_show_nothing_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dashboard.check(configured(override))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install wandb-workspaces"):
        dashboard.check(configured())


def command(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-m", "powerflow_lit.dashboard", *overrides],
        cwd=folder, env={**environment, "HOME": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_writes_the_users_own_panel_and_nothing_else(tmp_path: Path) -> None:
    panel = "+sections.mine.learning_rate=[train/lr]"
    result = command(tmp_path, "dry_run=true", "output=out/dashboard.json", panel)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out" / "dashboard.json").read_text())
    assert panels(written["workspace"])["learning_rate"]["metrics"] == ["train/lr"]
    assert {path.name for path in tmp_path.glob("*") if not path.name.startswith(".")} == {"out"}


def test_the_command_without_account_ends_in_one_line(tmp_path: Path) -> None:
    result = command(tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: entity=null")
