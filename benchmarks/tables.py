"""Tables of stored results, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

PHASES = ("rollout", "score", "update", "sync")
NAMES = {
    "ours-vllm": "ours, vLLM",
    "ours-hf": "ours, `generate`",
    "trl-vllm": "TRL, vLLM",
    "trl-own": "TRL, `generate`",
    "bound": "the bound",
}
RIVALS = {"ours-vllm": "trl-vllm", "ours-hf": "trl-own"}


def markdown(record: Mapping[str, Any]) -> str:
    """The record's table, by what it is a record of."""
    kind = record.get("kind", "comparison")
    if kind == "growth":
        return growth(record)
    if kind == "gpu":
        return gpu(record)
    return comparison(record)


def comparison(record: Mapping[str, Any]) -> str:
    """Medians of the refills of each contender; ratios of medians."""
    head = ["Workload", "Contender", "Tokens/s", *(f"{p.capitalize()} s" for p in PHASES),
            "Between s", "CPU s", "Times TRL", "(Score + update) / bound", "Peak MB"]  # fmt: skip
    rows = []
    for entry in record["workloads"]:
        contenders = {n: c for n, c in entry["contenders"].items() if c.get("refills")}
        medians = {name: medians_of(c["refills"]) for name, c in contenders.items()}
        tokens = entry["tokens"]["response"]
        for name, found in medians.items():
            rows.append(
                [
                    entry["workload"]["name"],
                    NAMES.get(name, name),
                    f"{tokens / found['wall']:,.0f}",
                    *(f"{found[phase]:.2f}" for phase in PHASES),
                    f"{found['between']:.2f}",
                    f"{found['cpu']:.1f}",
                    times_rival(name, medians),
                    times_bound(name, medians),
                    f"{contenders[name]['peak_mb']:,.0f}",
                ]
            )
        for name, found in entry["contenders"].items():
            if "error" in found:
                said = found["error"].splitlines()[-1]
                rows.append([entry["workload"]["name"], NAMES.get(name, name), f"failed: {said}"])
    return as_markdown(head, rows)


def medians_of(refills: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a refill: wall, CPU, each phase, and what lies between the phases."""
    phases = {p: median(r["phases"].get(p, 0.0) for r in refills) for p in PHASES}
    between = median(r["wall_s"] - sum(r["phases"].get(p, 0.0) for p in PHASES) for r in refills)
    wall, cpu = (median(r[key] for r in refills) for key in ("wall_s", "cpu_s"))
    return {"wall": wall, "cpu": cpu, "between": between, **phases}


def times_rival(name: str, medians: Mapping[str, Mapping[str, float]]) -> str:
    """How many times the tokens/s of TRL with the same kind of engine."""
    rival = RIVALS.get(name)
    if rival is None or rival not in medians:
        return ""
    return f"{medians[rival]['wall'] / medians[name]['wall']:.2f}"


def times_bound(name: str, medians: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds of scoring and updates together, over those of the bound."""
    if "bound" not in medians or name == "bound":
        return ""
    least = medians["bound"]["score"] + medians["bound"]["update"]
    return f"{(medians[name]['score'] + medians[name]['update']) / least:.2f}"


def growth(record: Mapping[str, Any]) -> str:
    head = ["Grows", "Value", "Tokens/s", "Seconds a refill", "Peak MB"]
    rows = [
        [p["factor"], f"{p['value']:,}", f"{p['tokens_per_s']:,.0f}", f"{p['wall_s']:.2f}",
         f"{p['peak_mb']:,.0f}"]
        for p in record["points"]
    ]  # fmt: skip
    return as_markdown(head, rows)


def gpu(record: Mapping[str, Any]) -> str:
    head = ["Model", "Engine", "Tokens/s", *(f"{p.capitalize()} s" for p in PHASES),
            "Score MFU", "Update MFU", "Peak GB"]  # fmt: skip
    rows = []
    for entry in record["models"]:
        found = medians_of(entry["refills"])
        shares = [
            "" if entry[key] is None else f"{entry[key]:.1%}" for key in ("score_mfu", "update_mfu")
        ]
        rows.append(
            [entry["workload"]["shape"], entry["engine"],
             f"{entry['tokens']['response'] / found['wall']:,.0f}",
             *(f"{found[phase]:.2f}" for phase in PHASES), *shares,
             f"{entry['peak_device_gb']:.1f}"]
        )  # fmt: skip
    return as_markdown(head, rows)


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    full = [head, *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    widths = [max(len(row[i]) for row in full) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in full
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
