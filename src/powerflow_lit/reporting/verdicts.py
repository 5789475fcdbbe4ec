"""What became of a run, in words, with the numbers that say so. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from powerflow_lit.config.schema_tools import VerdictConfig
from powerflow_lit.reporting.runs import Run

Tone = Literal["good", "bad", "open"]
SPREAD, ON_POLICY = "selfcheck/residual_std_on_base", "train/residual_std"


@dataclass(frozen=True)
class Finding:
    """One thing said of a run: words that are the same for all runs, and this run's numbers."""

    words: str
    numbers: str
    tone: Tone


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on; anything may be missing.

    Attributes:
        start, end: of the base and of the policy at the end: `length_mean` (tokens),
            `repetition`, `truncated_frac`, `format_rate` (shares).
        headline: the headline metric by refill, 0 the base; `headline_name` without `val/`.
        spread: residual spread on base samples by refill; `on_policy` on the policy's own.
    """

    status: str
    start: Mapping[str, float]
    end: Mapping[str, float]
    headline_name: str
    headline: Mapping[int, float]
    spread: Mapping[int, float]
    on_policy: Mapping[int, float]
    after: str = ""  # e.g. "after 12 of 60 refills"


def evidence(run: Run, headline: str | None, tail: int) -> Evidence:
    """The evidence of a run; rollout figures at the end are means over the last `tail` refills."""
    start, end = {}, {}
    for name in ("length_mean", "repetition", "truncated_frac", "format_rate"):
        first, last = run.base.get(f"val/{name}"), run.final.get(f"val/{name}")
        curve = run.curve(f"rollout/{name}")
        # val/ figures rest on far more samples than a refill's; both ends from the same source
        if (first is None or last is None) and curve:
            first = curve.get(0)
            last = _end(curve, tail)
        if first is not None and last is not None:
            start[name], end[name] = first, last
    curve = dict(run.curve(headline)) if headline else {}
    if headline and headline in run.base:
        curve.setdefault(0, run.base[headline])
    of = f" of {run.planned}" if run.planned is not None else ""
    return Evidence(
        run.status, start, end, (headline or "").removeprefix("val/"), curve,
        run.curve(SPREAD), run.curve(ON_POLICY), f"after {run.refills}{of} refills",
    )  # fmt: skip


def verdict(seen: Evidence, limits: VerdictConfig) -> list[Finding]:
    """Everything that can be said of a run, the worst first."""
    found = _ending(seen) + _degenerate(seen, limits) + _convergence(seen, limits)
    found += _headline(seen, limits)
    order = {"bad": 0, "open": 1, "good": 2}
    found.sort(key=lambda f: order[f.tone])
    return found or [Finding("nothing can be said", "no metric that a verdict needs", "open")]


def _ending(seen: Evidence) -> list[Finding]:
    if seen.status == "finished":
        return []
    return [Finding(seen.status, seen.after, "bad")]


def _degenerate(seen: Evidence, limits: VerdictConfig) -> list[Finding]:
    found = []
    for name, (before, after) in _pairs(seen).items():
        if name == "length_mean" and before > 0:
            said = f"{before:.1f} → {after:.1f} tokens ({after / before:.0%} of the base's)"
            if after < limits.length_collapse * before:
                found.append(Finding("collapsed in length", said, "bad"))
            elif after > limits.length_growth * before:
                found.append(Finding("drifted long", said, "bad"))
        elif name == "repetition":
            rose = after > before + limits.repetition_rise and after > 2 * before
            if rose:
                said = f"repeated 4-grams {before:.3f} → {after:.3f}"
                found.append(Finding("hacked by repetition", said, "bad"))
        elif name == "truncated_frac" and after > before + limits.truncation_rise:
            found.append(Finding("truncated", f"cut off {before:.0%} → {after:.0%}", "bad"))
        elif name == "format_rate" and after < before - limits.format_loss:
            found.append(Finding("lost the format", f"{before:.0%} → {after:.0%}", "bad"))
    return found


def _convergence(seen: Evidence, limits: VerdictConfig) -> list[Finding]:
    spread = seen.spread
    if len(spread) < 2:
        return []
    first, last = spread[min(spread)], _end(spread, limits.tail)
    change = f" ({last / first - 1:+.0%})" if first > 0 else ""
    said = f"residual spread on base samples {first:.3g} → {last:.3g}{change}"
    fell = last < limits.spread_fall * first
    small = None
    if seen.on_policy:
        own = _median_end(seen.on_policy)
        said += f", on its own samples {own:.3g}"
        small = own < limits.on_policy_small * last
    if fell:
        return [Finding("converging", said, "good")]
    if small:
        return [Finding("looks collapsed rather than converged", said, "bad")]
    if last > limits.spread_rise * first:
        return [Finding("moving away from the target on base samples", said, "bad")]
    return [Finding("no clear convergence yet", said, "open")]


def _headline(seen: Evidence, limits: VerdictConfig) -> list[Finding]:
    curve = seen.headline
    if len(curve) < 2:
        return []
    name, refills = seen.headline_name, sorted(curve)
    peak_at = max(refills, key=lambda r: (curve[r], -r))
    peak, last, start = curve[peak_at], curve[refills[-1]], curve[refills[0]]
    found = []
    if last < (1 - limits.peak_loss) * start:
        said = f"{name} {start:.3f} → {last:.3f}"
        found.append(Finding("ended below its base", said, "bad"))
    if peak > 0 and 0 < peak_at < refills[-1] and last < (1 - limits.peak_loss) * peak:
        said = f"lost {1 - last / peak:.0%} of its peak: {name} {peak:.3f} at refill {peak_at}"
        return [*found, Finding("peaked and fell", f"{said}, {last:.3f} at the end", "bad")]
    if found:
        return found
    # the value two thirds of the way in
    earlier = [r for r in refills if r <= refills[-1] * 2 / 3]
    before = curve[earlier[-1]]
    said = f"{name} {start:.3f} → {last:.3f}, {before:.3f} at refill {earlier[-1]}"
    if last - before > limits.still_improving * max(abs(before), 1e-9) and last > start:
        return [Finding("still improving", said, "good")]
    if last > (1 + limits.still_improving) * start:
        return [Finding("improved, then levelled off", said, "good")]
    return [Finding("no gain over its base", said, "open")]


def _pairs(seen: Evidence) -> dict[str, tuple[float, float]]:
    return {name: (seen.start[name], seen.end[name]) for name in seen.start if name in seen.end}


def _end(curve: Mapping[int, float], tail: int) -> float:
    """Mean over the last `tail` points, but never over more than the last third of them."""
    refills = sorted(curve)
    taken = refills[-max(1, min(tail, len(refills) // 3)) :]
    return sum(curve[r] for r in taken) / len(taken)


def _median_end(curve: Mapping[int, float]) -> float:
    """Median over the last third: a single refill with a stray response does not count."""
    refills = sorted(curve)
    taken = refills[-max(1, len(refills) // 3) :]
    return median(curve[r] for r in taken)


def together(findings: Sequence[tuple[str, Finding]]) -> list[tuple[str, Tone, list[str]]]:
    """Findings of several runs with the same words set together.

    Args:
        findings: (name of the run, finding).

    Returns:
        (words, tone, `run: numbers` of each run) for each, the most frequent bad ones first.
    """
    order = {"bad": 0, "open": 1, "good": 2}
    found: dict[str, tuple[Tone, list[str]]] = {}
    for name, finding in findings:
        found.setdefault(finding.words, (finding.tone, []))[1].append(f"{name}: {finding.numbers}")
    listed = [(words, tone, lines) for words, (tone, lines) in found.items()]
    return sorted(listed, key=lambda x: (order[x[1]], -len(x[2])))
