"""docs/extending.md, done as written: a strategy and a task from outside of the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.test_commands import summary_of

DOC = Path(__file__).parents[2] / "docs" / "extending.md"


def write_blocks(folder: Path) -> list[str]:
    """Each code block whose first line is `# path` becomes that file."""
    written = []
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", DOC.read_text(), flags=re.S):
        name = block.splitlines()[0].removeprefix("# ")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
        written.append(name)
    return written


def run(folder: Path, *chosen: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "powerflow_lit.train", "--config-dir", "my_conf"]
    few = ["callbacks.evaluation.max_prompts=16", "callbacks.export=false"]
    quick = ["debug=fast", "rollout=hf", "logger=none", "run_dir=run", *few]
    result = subprocess.run(
        [*command, *chosen, *quick],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return summary_of(folder / "run")


def test_a_strategy_and_a_task_of_ones_own_need_no_change_of_the_package(tmp_path: Path) -> None:
    names = write_blocks(tmp_path)
    assert {"my_conf/strategy/square_root.yaml", "my_conf/task/counting.yaml"} <= set(names)
    summary = run(tmp_path, "strategy=square_root", "task=counting", "log_z=group", "alpha=2")
    assert (summary["status"], summary["strategy"], summary["task"]) == (
        "finished", "square_root", "counting",
    )  # fmt: skip


def test_a_reward_of_ones_own_is_one_function_and_one_yaml(tmp_path: Path) -> None:
    names = write_blocks(tmp_path)
    assert {"brevity.py", "my_conf/strategy/brevity.yaml"} <= set(names)
    summary = run(tmp_path, "strategy=brevity")
    assert (summary["status"], summary["strategy"]) == ("finished", "brevity")
    assert (summary["supervised"], summary["uses_alpha"]) == (False, False)
    rows = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    # its definition: agreement is worth 1, a token costs 0.01
    worth = {round(row["reward"] + 0.01 * row["length"], 6) for row in rows}
    assert worth <= {0.0, 1.0}
    assert len({row["reward"] for row in rows}) > 1
