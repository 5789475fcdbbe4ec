"""Times training end to end, beside TRL and beside the bound that the arithmetic sets.

python -m benchmarks.run --suite cpu              # about 20 minutes on two quiet cores
python -m benchmarks.run --suite cpu --quick      # a few minutes: the smallest model alone
python -m benchmarks.run --suite gpu              # step time, memory, FLOPs utilisation
python -m benchmarks.run --growth                 # how cost grows, with a plot each
python -m benchmarks.run --table FILE             # the table of stored results, in Markdown
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.comparing import CONTENDERS, REFILLS, compare
from benchmarks.turns import ContenderError
from benchmarks.workloads import Workload, suite

RESULTS = Path(__file__).parent / "results"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest model, few refills")
    parser.add_argument("--growth", action="store_true", help="how cost grows, ours alone")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print it from stored results")
    parser.add_argument("--shapes", nargs="+", default=None, help="models, see models.SHAPES")
    parser.add_argument("--lengths", nargs="+", default=None, choices=["equal", "ragged"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--refills", type=int, default=None, help="timed ones, of each contender")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each contender")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE",
                        help="configuration of ours, as for powerflow_lit.train")  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="of --suite gpu; cpu only shows that the suite works")  # fmt: skip
    parser.add_argument("--peak-tflops", type=float, default=None,
                        help="of the device in bf16, where its name is not known")  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="JSON (and plots beside it)")
    return parser.parse_args(arguments)


def workloads_of(options: argparse.Namespace) -> list[Workload]:
    if options.shapes is None and not options.quick:
        # the large vocabulary is about memory and its own kernels: one kind of lengths will do
        lengths = options.lengths or ["equal", "ragged"]
        return suite(["0.8M", "25M"], lengths) + suite(["151k-vocab"], lengths[-1:])
    return suite(options.shapes or ["0.8M"], options.lengths or ["equal", "ragged"])


def available(contenders: list[str]) -> list[str]:
    """Without those whose packages are not installed, each kind named in a line."""
    for package, remedy in (("trl", "make install-bench"), ("vllm", "make install")):
        needing = [name for name in contenders if package in name.replace(" ", "-").split("-")]
        if needing and find_spec(package) is None:
            print(f"without {', '.join(needing)}: {package} is not installed ({remedy})")
            contenders = [name for name in contenders if name not in needing]
    return contenders


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.table is not None:
        print(tables.markdown(json.loads(options.table.read_text())))
        return 0
    try:
        record = _measured(options)
    except ContenderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if record is None:
        return 2
    print(tables.markdown(record))
    return 0


def _measured(options: argparse.Namespace) -> dict[str, Any] | None:
    """What was measured, also written; None where the suite is refused."""
    if options.growth:
        from benchmarks.growth import grow

        return grow(options.out or RESULTS / "growth.json", threads=options.threads,
                    overrides=options.override, quick=options.quick)  # fmt: skip
    if options.suite == "gpu":
        from benchmarks.gpu import measure_gpu, refusal

        if why := refusal(options.device):
            print(f"error: {why}", file=sys.stderr)
            return None
        return measure_gpu(
            options.out or RESULTS / "gpu.json", shapes=options.shapes or ["0.5B", "1.5B"],
            device=options.device, refills=options.refills or 3, threads=options.threads,
            overrides=options.override, peak_tflops=options.peak_tflops,
        )  # fmt: skip
    contenders = available(options.contenders)
    if not contenders:
        raise ContenderError("no contender is left that can run here")
    return compare(
        workloads_of(options), contenders, options.out or RESULTS / "cpu.json",
        refills=lambda shape: options.refills or (2 if options.quick else REFILLS.get(shape, 3)),
        threads=options.threads, overrides=options.override,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
