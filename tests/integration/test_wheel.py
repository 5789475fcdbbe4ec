"""The built wheel is all that a run needs: it trains from an empty folder, without the sources."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
SECONDS = 600


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that sees neither the sources nor the W&B account."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WANDB"))}
    environment |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", folder, ROOT, cwd=folder)
    return next(folder.glob("powerflow_lit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environment with the wheel, which finds all else where this interpreter finds it."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # pip first: behind the .pth it would take the version that runs these tests for its own
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    run(*pip, wheel, cwd=folder)
    # --system-site-packages would show the base interpreter's packages, not its environment's.
    # Folders named in a .pth come after the wheel's, and their own .pth files are not read.
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text("".join(f"{p}\n" for p in others))
    return folder


@pytest.fixture(scope="module")
def run_dir(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = tmp_path_factory.mktemp("empty")
    hf = [] if importlib.util.find_spec("vllm") else ["rollout=hf"]
    run(installed / "bin" / "powerflow-train", "debug=fast", *hf, cwd=empty)
    assert [p.name for p in empty.iterdir()] == ["outputs"]
    (summary,) = empty.glob("outputs/**/summary.json")
    return summary.parent


def test_conf_and_the_embedded_weights_are_in_the_wheel(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [p for p in (ROOT / "conf").rglob("*") if p.is_file() and p.suffix == ".yaml"]
    assert sources
    assert {f"powerflow_lit/{p.relative_to(ROOT)}" for p in sources} <= names
    for model in ("tiny", "tiny_instruct"):
        for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            assert f"powerflow_lit/models/embedded/{model}/{file}" in names
    for genre in ("poem", "story", "joke"):
        assert f"powerflow_lit/tasks/prompts/{genre}.txt" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any("tests/" in name or name.endswith(".pyc") for name in names)


def test_the_package_comes_from_the_wheel(installed: Path, tmp_path: Path):
    code = "import powerflow_lit, powerflow_lit.config as c; print(powerflow_lit.__file__)"
    lines = run(
        installed / "bin" / "python", "-c", f"{code}; print(c.conf_dir())", cwd=tmp_path
    ).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert Path(line).is_relative_to(installed)


def test_every_console_script_starts(installed: Path, tmp_path: Path):
    for script in sorted((installed / "bin").glob("powerflow-*")):
        assert run(script, "--help", cwd=tmp_path)


def test_the_doctor_finds_all_in_the_wheel(installed: Path, tmp_path: Path):
    out = run(installed / "bin" / "powerflow-doctor", cwd=tmp_path)
    assert "Ready: powerflow-train" in out


def test_a_run_from_an_empty_folder_leaves_all_its_files_and_a_loadable_export(run_dir: Path):
    # one test, as pytest-xdist would give two of them a training run each
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["refills"] == 2
    assert summary["steps"] > 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["refills"] == 2
    assert "debug=fast" in yaml.safe_load((run_dir / "overrides.yaml").read_text())
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    assert max(int(row["step"]) for row in rows) >= summary["steps"] - 1
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {row["refill"] for row in samples} == {1, 2}
    assert (run_dir / "checkpoints" / "last.ckpt").stat().st_size > 0

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    out = model(**tokenizer("1 + 1", return_tensors="pt"))
    assert out.logits.isfinite().all()
