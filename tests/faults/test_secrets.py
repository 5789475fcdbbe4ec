"""Keys of the environment, also typed in full: none is in a file or a line of any command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.faults.runs import QUICK, end_of, start

pytestmark = pytest.mark.faults

SECRETS = {
    "HF_TOKEN": "hf_marker0123456789",
    "WANDB_API_KEY": "markerwandb" + "0123456789" * 3,
    "OPENAI_API_KEY": "sk-marker-0123456789",
    "AWS_SECRET_ACCESS_KEY": "marker/0123+456789",
}
# a key alone would mean online
ENVIRONMENT = {**SECRETS, "WANDB_MODE": "offline"}
TYPED = "logger.tags=['${oc.env:HF_TOKEN}'," + SECRETS["OPENAI_API_KEY"] + "]"


def nothing_of(folder: Path, printed: str) -> None:
    """No secret in the output, nor in any file as it lies there or unpacked."""
    for name, value in SECRETS.items():
        assert value not in printed, name
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                contents += [packed.read(member) for member in packed.namelist()]
        for name, value in SECRETS.items():
            assert not any(value.encode() in content for content in contents), (name, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with W&B whose tags are two of the keys."""
    folder = tmp_path_factory.mktemp("secrets")
    process = start(
        folder, *QUICK, "rollout=hf", "logger=wandb", "run_dir=run", "refills=1", TYPED,
        env=ENVIRONMENT,
    )  # fmt: skip
    code, output = end_of(process, within=300)
    assert code == 0, output
    (folder / "printed").write_text(output)
    return folder


def test_a_run_leaves_no_key_anywhere(folder: Path) -> None:
    files = {path.name for path in folder.rglob("*")}
    assert {"output.log", "config.yaml", "overrides.yaml", "last.ckpt", "README.md"} <= files
    assert "${oc.env:OPENAI_API_KEY}" in (folder / "run" / "config.yaml").read_text()
    nothing_of(folder, "")


def test_an_evaluation_of_it_leaves_none_either(folder: Path) -> None:
    """The path of a model is kept in eval.json, here with a key in it."""
    place = folder / f"model-{SECRETS['HF_TOKEN']}"
    place.symlink_to(folder / "run" / "export")
    done = subprocess.run(
        [sys.executable, "-m", "powerflow_lit.evaluate", "model=hf", f"model.path={place}",
         "rollout=hf", "samples_per_prompt=1", "decodings=[{temperature: 1, min_p: 0}]",
         "task.build.eval_size=8",
         "output=eval"],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "HOME": str(folder)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "${oc.env:HF_TOKEN}" in json.loads((folder / "eval" / "eval.json").read_text())["model"]
    place.unlink()
    nothing_of(folder / "eval", done.stdout + done.stderr)


@pytest.mark.parametrize("mode", [(), ("-m", "seed=0,1")], ids=["run", "multirun"])
@pytest.mark.parametrize(
    "wrong",
    [
        f"alpha={SECRETS['OPENAI_API_KEY']}",  # the line quotes the value
        f"task={SECRETS['OPENAI_API_KEY']}",  # Hydra itself does
        f"+{SECRETS['OPENAI_API_KEY']}=1",
        f"model.path=./{SECRETS['HF_TOKEN']}",
    ],
)
def test_an_error_that_quotes_a_key_hides_it(
    tmp_path: Path, wrong: str, mode: tuple[str, ...]
) -> None:
    process = start(tmp_path, *mode, *QUICK, "rollout=hf", wrong, env=ENVIRONMENT)
    code, output = end_of(process, within=120)
    assert code != 0
    assert "${oc.env:" in output
    nothing_of(tmp_path, output)
