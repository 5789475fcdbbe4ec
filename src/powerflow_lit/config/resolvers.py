"""Resolvers of conf/: arithmetic and choices that a yaml cannot say otherwise."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from powerflow_lit.config.identity import job_hash


def short(value: Any) -> str:
    """4 and 4.0 are spelt alike in a folder's name; what is no number is refused by the checks."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def product(one: float, other: float) -> float:
    """`${product:a,b}`; what is no number is refused by the checks, by the name of the result."""
    both = isinstance(one, int | float) and isinstance(other, int | float)
    return one * other if both else one if not isinstance(one, int | float) else other


def inverse(value: Any) -> float:
    """`${inverse:${alpha}}`: the temperature 1/alpha.

    Raises:
        ValueError: not a positive number.
    """
    number = _number(value, "inverse")
    if number <= 0:
        raise ValueError(f"alpha={value}: must be positive")
    return 1 / number


def times(one: Any, other: Any) -> int:
    """`${times:5,${rollout.max_new_tokens}}`: a product of whole numbers."""
    return int(_number(one, "times") * _number(other, "times"))


def if_benchmarks(chosen: Any, otherwise: Any, *, _root_: DictConfig) -> Any:
    """`${if_benchmarks:3072,${task.max_new_tokens}}`: the first where benchmarks are chosen."""
    return chosen if _root_.get("benchmarks") else otherwise


def gap_limit(engine_dtype: Any) -> float:
    """`${gap_limit:${model.engine_dtype}}`: nats a token that rounding alone may explain."""
    return 0.01 if engine_dtype == "float32" else 1.0


def precision_of(accelerator: Any) -> str:
    """`${precision_of:${.accelerator}}`: what suits the device's arithmetic."""
    return "32-true" if accelerator == "cpu" else "bf16-mixed"


def _number(value: Any, resolver: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number ({resolver})")
    return float(value)


def register_resolvers() -> None:
    """Make them known to OmegaConf; safe to call again."""
    for resolver in (
        job_hash,
        short,
        product,
        inverse,
        times,
        if_benchmarks,
        gap_limit,
        precision_of,
    ):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
