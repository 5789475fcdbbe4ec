"""As schema.py, for the entry points that neither train nor evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from powerflow_lit.config.schema import BootstrapConfig


@dataclass
class VerdictConfig:
    """Thresholds of the report's verdicts."""

    tail: int = MISSING
    length_collapse: float = MISSING
    length_growth: float = MISSING
    repetition_rise: float = MISSING
    truncation_rise: float = MISSING
    format_loss: float = MISSING
    spread_fall: float = MISSING
    spread_rise: float = MISSING
    on_policy_small: float = MISSING
    peak_loss: float = MISSING
    still_improving: float = MISSING


@dataclass
class ReportConfig:
    """`conf/report.yaml`."""

    runs: list[str] = MISSING
    evaluations: list[str] = MISSING
    output: str = MISSING
    title: str | None = MISSING
    note: str | None = MISSING
    metrics: list[str] = MISSING
    headline: list[str] = MISSING
    table: list[str] = MISSING
    group_by: list[str] | None = MISSING
    where: Any = MISSING  # a filter, or a list of alternative ones
    panels: Any = MISSING  # null, a dotted key, or a list of {name, where}
    x: str | None = MISSING
    scatter: dict[str, str] | None = MISSING
    smooth: int = MISSING
    dpi: int = MISSING
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    aliases: dict[str, str] = MISSING


@dataclass
class WandbReportConfig:
    title: str = MISSING
    text: str = MISSING
    strategies: list[str] = MISSING
    panels: dict[str, list[str]] = MISSING


@dataclass
class DashboardRunsConfig:
    task: str | None = MISSING
    model: str | None = MISSING
    group: str | None = MISSING


@dataclass
class DashboardConfig:
    """`conf/dashboard.yaml`."""

    entity: str | None = MISSING
    project: str = MISSING
    name: str = MISSING
    runs: DashboardRunsConfig = field(default_factory=DashboardRunsConfig)
    k: int = MISSING
    x_axis: str = MISSING
    max_lines: int = MISSING
    alphas: list[float] = MISSING
    smoothing: dict[str, float] = MISSING
    sections: dict[str, dict[str, list[str]]] = MISSING
    report: WandbReportConfig = field(default_factory=WandbReportConfig)
    dry_run: bool = MISSING
    output: str | None = MISSING


@dataclass
class ShapeConfig:
    hidden_size: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    feed_forward: int = MISSING


@dataclass
class PretrainingConfig:
    max_tokens: int = MISSING
    batch_documents: int = MISSING
    lr: float = MISSING
    warmup_steps: int = MISSING
    weight_decay: float = MISSING


@dataclass
class PretrainConfig:
    """`conf/pretrain.yaml`."""

    embedded: str = MISSING
    output: str | None = MISSING
    seed: int = MISSING
    corpus_seed: int = MISSING
    threads: int = MISSING
    corpus_noise: float = MISSING
    steps: dict[str, int] = MISSING
    logit_scale: dict[str, float] = MISSING
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    training: PretrainingConfig = field(default_factory=PretrainingConfig)


@dataclass
class SourceConfig:
    path: str = MISSING
    split: str = MISSING
    subset: str | None = MISSING
    revision: str | None = MISSING
    question_column: str | None = MISSING
    answer_column: str | None = MISSING


@dataclass
class SolutionConfig:
    column: str = MISSING
    tokenizer: str | None = MISSING
    max_tokens: int | None = MISSING
    max_words: int | None = MISSING


@dataclass
class RecipeRulesConfig:
    without_answer: bool = MISSING
    leaked_answer_characters: int | None = MISSING
    max_question_characters: int | None = MISSING
    proofs: bool = MISSING
    multiple_choice: bool = MISSING
    non_numeric: bool = MISSING


@dataclass
class PrepareDataConfig:
    """`conf/prepare_data.yaml`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    output: str = MISSING
    size: int | None = MISSING
    seed: int = MISSING
    instruction: str = MISSING
    data_source: str = MISSING
    drop: RecipeRulesConfig = field(default_factory=RecipeRulesConfig)
    solution: SolutionConfig = field(default_factory=SolutionConfig)
