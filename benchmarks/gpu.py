"""Step time, memory and model-FLOPs utilisation of ours at real shapes, with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.comparing import new_record, take_turns, write
from benchmarks.models import Shape, shape_of, write_model
from benchmarks.tables import medians_of
from benchmarks.turns import ContenderError
from benchmarks.workloads import Workload

# dense bf16 TFLOP/s by a part of the device's name (the makers' data sheets)
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0,
    "RTX 4090": 165.0, "A10": 125.0,
}  # fmt: skip


def refusal(device: str) -> str | None:
    """Why the suite cannot run here, in a line; None where it can."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return (
            "--suite gpu needs a GPU and torch sees none; `--device cpu --shapes tiny` shows only "
            "that the suite works"
        )
    return None


def gpu_workload(shape: str) -> Workload:
    """Longer responses than on the CPU; those of the tiny shape stay short."""
    if shape == "tiny":
        return Workload("gpu", shape, "ragged", prompts=2, rollouts=2, response_range=(4, 16),
                        response_mean=8, prompt_mean=8)  # fmt: skip
    return Workload("gpu", shape, "ragged", prompt_mean=128, prompt_range=(32, 384),
                    response_mean=256, response_range=(16, 1024))  # fmt: skip


def model_flops(shape: Shape, workload: Workload) -> dict[str, float]:
    """FLOPs that a refill's useful tokens need: scored once, trained on once.

    The backward pass counts twice the forward; recomputation and padding count nothing.
    """
    forward = shape.forward_flops(
        workload.useful_tokens, workload.response_tokens, workload.attended_pairs
    )
    return {"score": float(forward), "update": 3.0 * forward}


def utilisation(flops: float, seconds: float, peak_tflops: float | None) -> float | None:
    """Share of the device's peak; None where that is unknown."""
    return None if peak_tflops is None or not seconds else flops / seconds / (peak_tflops * 1e12)


def settings_of(device: str, engine: str) -> list[str]:
    """Ours as on a GPU: bf16 mixed precision, the base and the rollouts in bf16."""
    precision = "trainer.precision=bf16-mixed"
    trainer = ["trainer=gpu" if device == "cuda" else "trainer=cpu", precision]
    # transformers' engine samples from float32 weights, the trainer computes in bf16
    dtype = "float32" if engine == "hf" else "bfloat16"
    return [
        *trainer, "model.base_dtype=bfloat16", f"model.engine_dtype={dtype}",
        "rollout.logp_gap_limit=1.0",
    ]  # fmt: skip


def measure_gpu(
    out: Path,
    *,
    shapes: Sequence[str],
    device: str,
    refills: int,
    threads: int,
    overrides: Sequence[str],
    peak_tflops: float | None,
) -> dict[str, Any]:
    """Refills of ours at each shape.

    Args:
        device: `cuda`, or `cpu` to try the suite without one.
        peak_tflops: of the device in bf16; None looks its name up.

    Raises:
        ContenderError: ours failed.
    """
    name = _device_name(device)
    if peak_tflops is None:
        peak_tflops = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
        if peak_tflops is None:
            print(f"no utilisation: the peak of {name} is not known (--peak-tflops)")
    engine = "vllm" if device == "cuda" and find_spec("vllm") else "hf"
    record = new_record(threads, overrides)
    record |= {"kind": "gpu", "device": name, "peak_tflops": peak_tflops, "models": []}
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            workload = gpu_workload(shape)
            print(f"{shape}: writing random weights, then {refills} refills on {name}")
            model = write_model(shape_of(shape), Path(folder) / shape, dtype="bfloat16")
            settings = {
                "workload": asdict(workload), "model": str(model), "threads": threads,
                "overrides": [*settings_of(device, engine), *overrides],
            }  # fmt: skip
            found = take_turns(
                {"ours": ("benchmarks.ours", engine)}, settings, Path(folder),
                refills=refills, step=print,
            )["ours"]  # fmt: skip
            if "error" in found:
                raise ContenderError(found["error"])
            flops, seconds = (
                model_flops(shape_of(shape), workload),
                medians_of(found["refills"]),
            )
            record["models"].append(
                {
                    "workload": asdict(workload),
                    "engine": engine,
                    "tokens": {"response": workload.response_tokens,
                               "useful": workload.useful_tokens},
                    "model_flops": flops,
                    "score_mfu": utilisation(flops["score"], seconds["score"], peak_tflops),
                    "update_mfu": utilisation(flops["update"], seconds["update"], peak_tflops),
                    "peak_device_gb": max(r["device_gb"] for r in found["refills"]),
                    **found,
                }
            )  # fmt: skip
            write(record, out)
    print(f"written to {out}")
    return record


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"
