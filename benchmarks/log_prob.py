"""Time and peak memory of the log-prob of given tokens at a large vocabulary, method by method.

python -m benchmarks.log_prob                     # every method at every number of rows, minutes
python -m benchmarks.log_prob --methods recompute --rows 1024 8192
python -m benchmarks.log_prob --device cuda --dtype bfloat16

Each cell runs forward and backward in a fresh process. The peak is what was held at once beyond
the inputs and their gradients: on the CPU the peak resident size of the process (Linux; buffers of
its kernels included) minus the size before, and in the backward pass minus the gradients; on a GPU
the same of the allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from powerflow_lit.models.linear_log_prob import linear_log_prob, row_chunks

RESULTS = Path(__file__).parent / "results"
WHOLE = ("naive",)  # methods that hold all logits, and the largest number of rows to try them at
WHOLE_ROWS = 2048
# glibc gives every block of 1 MiB or more back at once, so that the peak is what was really held
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    rows: int
    vocabulary: int = 151_936  # of Qwen2.5
    hidden: int = 896  # of Qwen2.5-0.5B
    chunk: int = 128  # rows of logits at once
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    frozen: bool = False  # the output layer takes no gradient, as with LoRA
    repeats: int = 1


@dataclass(frozen=True)
class Measured:
    seconds: float  # median of the repeats, forward and backward
    cpu_seconds: float  # the same in CPU time, which a busy machine changes less
    peak_mb: float  # MB (10^6 bytes) beyond inputs and gradients
    value_error: float | None  # nats, largest difference from the naive method
    gradient_error: float | None  # largest difference, as a share of the largest entry


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return torch.cat(
        [
            checkpoint(naive, hidden[rows], weight, targets[rows], chunk, use_reentrant=False)
            for rows in row_chunks(len(hidden), chunk)
        ]
    )


def torch_fused(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """torch >= 2.13."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=options
    )


def recompute(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return linear_log_prob(
        hidden, weight, targets,
        bias=None, scale=1.0, soft_cap=None, temperature=1.0, rows_per_chunk=chunk,
    )  # fmt: skip


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "naive": naive,
    "linear_cross_entropy": torch_fused,
    "checkpoint": checkpointed,
    "recompute": recompute,
}


def inputs_of(cell: Cell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weights, targets, and the gradient of the log-probs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(cell.rows, cell.hidden, generator=generator)
    weight = torch.empty(cell.vocabulary, cell.hidden).normal_(std=0.05, generator=generator)
    targets = torch.randint(cell.vocabulary, (cell.rows,), generator=generator)
    grad = torch.randn(cell.rows, generator=generator)
    where = {"device": cell.device, "dtype": getattr(torch, cell.dtype)}
    return (
        hidden.to(**where).requires_grad_(),
        weight.to(**where).requires_grad_(not cell.frozen),
        targets.to(cell.device),
        grad.to(cell.device),
    )


def forward(cell: Cell, inputs: tuple[Tensor, ...]) -> Tensor:
    log_prob = METHODS[cell.method](*inputs[:3], cell.chunk)
    if cell.device == "cuda":
        torch.cuda.synchronize()
    return log_prob


def backward(cell: Cell, inputs: tuple[Tensor, ...], log_prob: Tensor) -> list[Tensor]:
    hidden, weight, _, grad = inputs
    wanted = [hidden] if cell.frozen else [hidden, weight]
    gradients = torch.autograd.grad(log_prob, wanted, grad.to(log_prob.dtype))
    if cell.device == "cuda":
        torch.cuda.synchronize()
    return list(gradients)


def measure(cell: Cell) -> Measured:
    """The cell in a process of its own.

    Raises:
        RuntimeError: that process failed; with its last lines.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.log_prob", "--cell", json.dumps(asdict(cell))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | RETURN_MEMORY | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    if done.returncode:
        raise RuntimeError(f"{cell}: {done.stderr.strip()[-500:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(cell: Cell) -> Measured:
    """The cell in this process, whose peak must not have been reached by anything else."""
    torch.set_num_threads(cell.threads)
    small = replace(cell, rows=2)
    warm = inputs_of(small)
    backward(small, warm, forward(small, warm))  # loads kernels and starts threads
    del warm
    inputs = inputs_of(cell)
    seconds, peak = [], 0.0
    cpu = []
    for _ in range(cell.repeats):
        before = held(cell.device, start=True)
        begun, cpu_begun = time.perf_counter(), time.process_time()
        log_prob = forward(cell, inputs)
        middle = time.perf_counter()
        in_forward = held(cell.device, start=False) - before
        held(cell.device, start=True)
        resumed = time.perf_counter()
        gradients = backward(cell, inputs, log_prob)
        seconds.append(time.perf_counter() - resumed + middle - begun)
        cpu.append(time.process_time() - cpu_begun)
        kept = sum(g.nbytes for g in gradients)
        peak = max(peak, in_forward, held(cell.device, start=False) - before - kept)
        errors = None, None
        if cell.rows <= WHOLE_ROWS and cell.method not in WHOLE:
            errors = differences(cell, inputs, log_prob, gradients)
    return Measured(median(seconds), median(cpu), peak / 1e6, *errors)


def held(device: str, *, start: bool) -> int:
    """Bytes held now (`start`, which also resets the peak), or at most since then."""
    if device == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS:" if start else "VmHWM:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def differences(
    cell: Cell, inputs: tuple[Tensor, ...], log_prob: Tensor, gradients: list[Tensor]
) -> tuple[float, float]:
    whole = replace(cell, method="naive")
    expected = forward(whole, inputs)
    pairs = list(zip(gradients, backward(whole, inputs, expected), strict=True))
    return (
        float((log_prob - expected).abs().max()),
        max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
    )


def table(measured: dict[Cell, Measured]) -> str:
    head = f"{'method':<22}{'rows':>6}{'chunk':>7}{'seconds':>9}{'CPU s':>8}{'peak MB':>9}"
    head += f"{'value error':>13}{'gradient error':>16}"
    lines = [head, "-" * len(head)]
    for cell, found in measured.items():
        lines.append(
            f"{cell.method:<22}{cell.rows:>6}{'' if cell.method in WHOLE else cell.chunk:>7}"
            f"{found.seconds:>9.2f}{found.cpu_seconds:>8.2f}{found.peak_mb:>9.0f}"
            + (
                ""
                if found.value_error is None
                else f"{found.value_error:>13.1e}{found.gradient_error:>16.1e}"
            )
        )
    return "\n".join(lines)


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    chosen = []
    for rows in arguments.rows:
        for method in arguments.methods:
            for chunk in arguments.chunk[: 1 if method in WHOLE else None]:
                cell = Cell(
                    method, rows, arguments.vocabulary, arguments.hidden, chunk, arguments.dtype,
                    arguments.device, arguments.threads, arguments.frozen, arguments.repeats,
                )  # fmt: skip
                if method not in WHOLE or rows <= WHOLE_ROWS:
                    chosen.append(cell)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1024, 4096, 8192])
    parser.add_argument("--chunk", nargs="+", type=int, default=[Cell.chunk])
    for name in ("vocabulary", "hidden", "threads", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Cell, name))
    parser.add_argument("--dtype", default=Cell.dtype, choices=["float32", "bfloat16"])
    parser.add_argument("--device", default=Cell.device, choices=["cpu", "cuda"])
    parser.add_argument("--frozen", action="store_true", help="no gradient of the output layer")
    parser.add_argument("--output", type=Path, default=RESULTS / "log_prob.json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(asdict(measure_here(Cell(**json.loads(arguments.cell))))))
        return
    measured: dict[Cell, Measured] = {}
    cells = cells_of(arguments)
    for number, cell in enumerate(cells, 1):
        print(f"\r{number}/{len(cells)} {cell.method} {cell.rows}".ljust(60), end="", flush=True)
        measured[cell] = measure(cell)
        write(arguments.output, arguments.device, measured)  # what is measured survives a stop
    print(f"\r{table(measured)}")
    print(f"written to {arguments.output}")


def write(path: Path, device: str, measured: dict[Cell, Measured]) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    cells = [asdict(cell) | asdict(found) for cell, found in measured.items()]
    record = {"torch": torch.__version__, "device": name, "cells": cells}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
