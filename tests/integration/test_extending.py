"""docs/extending.md, done as written: a strategy and a task from outside of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_a_strategy_and_a_task_of_ones_own_need_no_change_of_the_package(tmp_path: Path) -> None:
    names = write_blocks(tmp_path)
    assert {"my_conf/strategy/square_root.yaml", "my_conf/task/counting.yaml"} <= set(names)
    command = [sys.executable, "-m", "powerflow_lit.train", "--config-dir", "my_conf"]
    chosen = ["strategy=square_root", "task=counting", "log_z=group", "alpha=2"]
    few = "callbacks.evaluation.max_prompts=16"
    quick = ["debug=fast", "rollout=hf", "logger=none", "run_dir=run", few]
    result = subprocess.run(
        [*command, *chosen, *quick],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["strategy"], summary["task"]) == (
        "finished", "square_root", "counting",
    )  # fmt: skip
