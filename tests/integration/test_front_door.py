"""What a user mistypes is refused in seconds, in one line, with nothing left behind.

Every input goes through the real command in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model

CPU_SECONDS = 5.0
HEAVY = {"lightning", "transformers", "vllm"}


@dataclass(frozen=True)
class Ended:
    """What a process left: its exit code, its words, its CPU time in seconds, new files."""

    code: int
    out: str
    err: str
    cpu_s: float
    files: tuple[str, ...]


def ended(folder: Path, arguments: Sequence[str], *python: str) -> Ended:
    """`python [python ...] arguments` from an empty folder `folder/work`, without a W&B login."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HYDRA"))}
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *python, *arguments],
            cwd=work,
            env={**environment, "HOME": str(folder / "home")},
            stdout=out,
            stderr=err,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        return Ended(
            code=process.returncode,
            out=out.read(),
            err=err.read(),
            cpu_s=usage.ru_utime + usage.ru_stime,
            files=tuple(sorted(path.name for path in work.iterdir())),
        )


def typed(folder: Path, line: str, command: str = "train") -> Ended:
    """`python -m powerflow_lit.<command> <line>`, the line as in a shell."""
    return ended(folder, ["-m", f"powerflow_lit.{command}", *shlex.split(line)])


def assert_refused(found: Ended, message: str, *, within_cpu_s: float = CPU_SECONDS) -> None:
    assert found.code == 2, found
    lines = [line for line in found.err.splitlines() if line.strip()]
    assert len(lines) == 1, found.err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert found.out == ""
    assert found.files == ()
    assert found.cpu_s < within_cpu_s, found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # names
        ("alhpa=2", r"unknown key 'alhpa': did you mean alpha\?"),
        ("+alpah=2", r"unknown key 'alpah': did you mean alpha\?"),
        ("optimizer.lrr=1e-4", r"did you mean optimizer\.lr\?"),
        ("lr=1e-4", r"unknown key 'lr': did you mean optimizer\.lr or model\.lr\?"),
        ("rollout.max_new_token=64", r"did you mean rollout\.max_new_tokens\?"),
        ("optimzer.lr=1e-4", r"did you mean optimizer\.lr\?"),
        ("+trainer.precison=bf16-mixed", r"did you mean trainer\.precision\?"),
        ("+trainer.max_epochs=3", r"trainer\.max_epochs: the run sets it itself; set refills="),
        ("+rollout.engine.max_num_seq=8", r"did you mean rollout\.engine\.max_num_seqs\?"),
        ("+strategy.objective.weight.eps=1", r"unknown key 'strategy\.objective\.weight\.eps'"),
        ("+task.build.train_sise=10", r"did you mean task\.build\.train_size\?"),
        # choices
        ("strategy=powrflow", r"strategy=powrflow: no such choice: did you mean powerflow\?"),
        ("stratgy=powerflow", r"unknown key 'stratgy': did you mean strategy\?"),
        ("+experiment=nope", r"experiment=nope: no such choice: there are alpha_ladder"),
        ("strategy=powerflow,tb_traj", r"several values: add -m"),
        ("trainer.precision=bf61-mixed", r"did you mean bf16-mixed\?"),
        ("model.kind=instrct", r"model\.kind=instrct: did you mean instruct\?"),
        # spelling
        ("alpha 0.5", r"cannot read 'alpha': .*without spaces: alpha=0\.5$"),
        ("--alpha=0.5", r"unknown option --alpha=0\.5: .* as in alpha=0\.5 "),
        ("=3", r"cannot read '=3': there is no key before the ="),
        ("alpha=[1", r"cannot read 'alpha=\[1': a bracket in its value is not closed"),
        # types
        ("alpha=abc", r"alpha=abc: must be a number"),
        ("alpha=true", r"alpha=True: must be a number"),
        ("rollout.engine=hf", r"rollout\.engine=hf: must be a group of keys"),
        ("model=hf", r"model\.path is missing"),
        # ranges
        ("alpha=0", r"alpha=0\.0: must be positive"),
        ("alpha=nan", r"alpha=nan: must be a finite number"),
        ("epsilon=1", r"epsilon=1\.0: must lie in \(0, 1\)"),
        ("optimizer.lr=-1e-4", r"optimizer\.lr=-0\.0001: must be positive"),
        ("seed=-1", r"seed=-1: must lie in \[0, 4294967295\]"),
        # contradictions
        ("log_z=group rollout.samples_per_prompt=1", r"samples_per_prompt=1 .* needs 2 or more"),
        ("strategy=rl_traj alpha=1", r"alpha=1\.0 with strategy=rl_traj: .*alpha > 1"),
        ("buffer.updates_per_refill=3", r"prompts_per_refill=16 is not divisible by .*refill=3"),
        ("rollout.max_new_tokens=4096", r"take 4160 tokens together, the context of .* is 512"),
        # places
        ("run_dir=/dev/null/run", r"cannot be written to \(Not a directory\): choose another"),
        ("resume=nowhere", r"resume=nowhere: no run folder there"),
        ("model=hf model.path=./nowhere", r"model\.path=\./nowhere: no such folder"),
        # jobs of a multirun that cannot even be composed
        ("-m alhpa=2,3", r"unknown key 'alhpa': did you mean alpha\?"),
    ],
)  # fmt: skip
def test_what_a_user_mistypes_is_refused_in_one_line(
    tmp_path: Path, line: str, message: str
) -> None:
    assert_refused(typed(tmp_path, line), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainer=gpu", r"trainer\.accelerator=gpu: .*take trainer=cpu"),
        ("rollout.max_prompt_tokens=4", r"max_prompt_tokens=4: 0 of 2048 training prompts"),
        ("strategy.objective.weight.kind=seq", r"strategy=powerflow: weight kind 'seq': .*seq_sum"),
        ("task=creative model=tiny", r"does not know the words .* model=tiny_instruct"),
    ],
)
def test_what_shows_only_when_it_is_built_is_refused_before_lightning_is_imported(
    tmp_path: Path, line: str, message: str
) -> None:
    import torch

    if line == "trainer=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert_refused(typed(tmp_path, line), message)


@pytest.mark.parametrize("line", ["alhpa=2", "rollout.prompts_per_refill=4096"])
def test_a_refusal_imports_no_heavy_library(tmp_path: Path, line: str) -> None:
    found = ended(tmp_path, ["-m", "powerflow_lit.train", line], "-X", "importtime")
    lines = found.err.splitlines()
    imports = [entry for entry in lines if entry.startswith("import time:")]
    modules = {entry.rpartition("|")[2].strip().partition(".")[0] for entry in imports}
    assert "hydra" in modules, "the import times were read"
    assert not modules & HEAVY
    assert found.code == 2
    assert [entry[:7] for entry in lines if entry not in imports] == ["error: "]


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("evaluate", "alpha=-1", r"decodings\[1\]\.temperature: alpha=-1: must be positive"),
        ("evaluate", "smaples_per_prompt=4", r"did you mean samples_per_prompt\?"),
        ("report", "smoth=3", r"did you mean smooth\?"),
        ("dashboard", "k=many", r"k=many: must be a whole number"),
        ("pretrain", "embedded=tyni", r"embedded=tyni: choose one of tiny, tiny_instruct"),
        ("prepare_data", "output=data/set.csv", r"must end in \.parquet"),
    ],
)
def test_every_entry_point_refuses_in_the_same_way(
    tmp_path: Path, command: str, line: str, message: str
) -> None:
    assert_refused(typed(tmp_path, line, command), message)


WITHOUT_VLLM = "import sys; sys.modules['vllm'] = None; from powerflow_lit.{} import main; main()"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_without_vllm_a_run_is_refused_and_hf_is_taken_only_where_it_is_asked_for(
    tmp_path: Path, command: str
) -> None:
    code = WITHOUT_VLLM.format(command)
    refused = ended(tmp_path, ["-c", code])
    assert_refused(refused, r"rollout=vllm: vLLM is not installed here: run make install .*=hf$")
    if command == "train":  # another setting is refused, later than the engine would have been
        asked = ended(tmp_path, ["-c", code, "rollout=hf", "model=hf", "model.path=./nowhere"])
        assert_refused(asked, "no such folder")


def test_a_model_that_brings_code_is_refused_in_one_line_and_its_code_does_not_run(
    tmp_path: Path,
) -> None:
    folder = make_tiny_model(tmp_path / "model", "llama")
    entries = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps({**entries, "model_type": "mine", "auto_map": code})
    )
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\n")
    found = typed(tmp_path, f"model=hf model.path={folder} rollout=hf logger=none")
    assert found.code == 2
    assert found.err.splitlines() == [
        f"error: model.path={folder} brings Python code of its own: read it, then set "
        "model.trust_remote_code=true"
    ]
    assert found.files == ()
    assert not (tmp_path / "it_ran").exists()


def test_a_chat_route_without_a_template_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "llama", chat=False)
    found = typed(tmp_path, f"model=hf model.path={folder} model.prompt_route=chat")
    assert_refused(found, "no chat template: set model.prompt_route=plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"questions\.jsonl is empty \(0 bytes\)"),
        ('{"titel": "What is 1 + 1?"}\n', r"none of its columns \(titel\) .*set question_column"),
    ],
)
def test_data_without_rows_or_without_questions_is_named(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    lengths = "rollout.max_new_tokens=64 rollout.max_prompt_tokens=64"
    data = f"task.build.train.path={file} task.build.eval.path={file}"
    found = typed(tmp_path, f"task=reasoning {data} {lengths}")
    assert_refused(found, message, within_cpu_s=2 * CPU_SECONDS)  # the data set is opened for it


def test_hydras_own_traceback_is_there_for_who_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "powerflow_lit.train", "alhpa=2"],
        cwd=tmp_path,
        env={**os.environ, "HYDRA_FULL_ERROR": "1"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" in found.stderr
    assert "ConfigCompositionException" in found.stderr


def test_showing_the_configuration_leaves_nothing_behind(tmp_path: Path) -> None:
    found = typed(tmp_path, "--cfg job alpha=3")
    assert found.code == 0, found.err
    assert "\nalpha: 3\n" in found.out
    assert found.files == ()
