"""Names and types of every configuration value; the values and their meaning stand in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    kind: str = MISSING
    paper_name: str | None = MISSING
    path: str = MISSING
    revision: str | None = MISSING
    prompt_route: str = MISSING
    dtype: str = MISSING
    base_dtype: str = MISSING
    engine_dtype: str = MISSING
    attn_implementation: str = MISSING
    packing: bool = MISSING
    stop_tokens: list[str] = MISSING
    gradient_checkpointing: bool = MISSING
    trust_remote_code: bool = MISSING
    threads: int | None = MISSING
    memory_check: bool = MISSING
    estimate_only: bool = MISSING
    lr: float = MISSING
    log_z_lr: float = MISSING


@dataclass
class FinetuneConfig:
    kind: str = MISSING
    lr_factor: float = MISSING
    rank: int | None = MISSING
    lora_alpha: float | None = MISSING
    dropout: float = MISSING
    target_modules: Any = MISSING  # a string or a list of strings


@dataclass
class DecodingConfig:
    temperature: float = MISSING
    top_p: float = 1.0  # all of the vocabulary, unless a decoding says otherwise
    min_p: float = MISSING


@dataclass
class TaskConfig:
    name: str = MISSING
    refills: int = MISSING
    max_new_tokens: int = MISSING
    max_prompt_tokens: int = MISSING
    default_alpha: dict[str, float] = MISSING
    base_decodings: list[DecodingConfig] = MISSING
    build: dict[str, Any] = MISSING


@dataclass
class RewardConfig:
    reads: list[str] = MISSING
    trained_share: float = MISSING
    function: dict[str, Any] = MISSING


@dataclass
class StrategyConfig:
    name: str = MISSING
    supervised: bool = False  # only one that says so may read reference answers
    uses_alpha: bool = True
    format_penalty: float = MISSING
    loss_scale: float = MISSING
    calibrate: dict[str, Any] = MISSING
    objective: dict[str, Any] = MISSING
    reward: RewardConfig | None = None  # of strategies that take one
    flow: dict[str, Any] | None = None  # of strategies that ask for log V


@dataclass
class RolloutConfig:
    prompts_per_refill: int = MISSING
    samples_per_prompt: int = MISSING
    base_share: float = MISSING
    max_new_tokens: int = MISSING
    max_prompt_tokens: int = MISSING
    logp_gap_trajectories: int = MISSING
    logp_gap_limit: float = MISSING
    overlap: bool = MISSING
    score_while_generating: bool = MISSING
    engine: dict[str, Any] = MISSING


@dataclass
class GuardConfig:
    min_p: float = MISSING


@dataclass
class BufferConfig:
    max_staleness: int = MISSING
    updates_per_refill: int = MISSING
    prompts_per_update: int | None = MISSING
    min_ess: float = MISSING
    log_p_old: str = MISSING


@dataclass
class OptimizerConfig:
    lr: float = MISSING
    log_z_lr: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    fused: bool | None = MISSING
    grad_clip: float = MISSING
    log_z_grad_clip: float = MISSING
    max_skipped_in_a_row: int = MISSING


@dataclass
class EvaluationConfig:
    every_n_refills: int = MISSING
    max_prompts: int | None = MISSING
    samples_per_prompt: int = MISSING
    seed: int = MISSING
    base_decodings: list[DecodingConfig] = MISSING


@dataclass
class SelfCheckConfig:
    every_n_refills: int = MISSING
    prompts: int = MISSING


@dataclass
class EveryConfig:
    every_n_refills: int = MISSING


@dataclass
class CheckpointConfig:
    every_n_refills: int = MISSING
    every_n_updates: int | None = MISSING
    keep_previous: bool = MISSING


@dataclass
class SamplesConfig:
    per_refill: int = MISSING


@dataclass
class CallbacksConfig:
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    selfcheck: SelfCheckConfig = field(default_factory=SelfCheckConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    console: EveryConfig = field(default_factory=EveryConfig)
    stop_signals: list[str] = MISSING
    export: bool = MISSING
    export_dtype: str | None = MISSING
    push_to_hub: str | None = MISSING
    push_private: bool = MISSING


@dataclass
class RuleConfig:
    metric: str = MISSING
    action: str = MISSING
    patience: int = MISSING
    above: float | None = None
    below: float | None = None
    relative: str | None = None
    hint: str = ""


@dataclass
class MonitorConfig:
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    pull_factor: float = MISSING
    pull_recovery: float = MISSING


@dataclass
class LoggerConfig:
    name: str = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    mode: str = MISSING
    group: str | None = MISSING
    tags: list[str] = MISSING


@dataclass
class DeviceConfig:
    """What a run is planned for, `conf/device/`."""

    name: str | None = MISSING
    memory_gib: float | None = MISSING
    reserved_gib: float = MISSING
    tflops_16: float | None = MISSING
    tflops_32: float | None = MISSING
    memory_gb_s: float | None = MISSING
    link_gb_s: float | None = MISSING
    network_gb_s: float | None = MISSING
    compute_share: float = MISSING
    memory_share: float = MISSING
    link_share: float = MISSING
    decode_step_ms: float = MISSING


@dataclass
class TrainConfig:
    """`conf/train.yaml` with its groups. Nodes with a `_target_` are checked when built."""

    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    alpha_schedule: dict[str, Any] = MISSING
    length_control: dict[str, Any] = MISSING
    log_z: dict[str, Any] = MISSING
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: dict[str, Any] = MISSING
    device: DeviceConfig = field(default_factory=DeviceConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    alpha: float = MISSING
    epsilon: float = MISSING
    seed: int = MISSING
    tokens_per_microbatch: int = MISSING
    logit_chunk_mb: float = MISSING
    refills: int = MISSING
    study: str = MISSING
    resume: str | None = MISSING
    resume_force: bool = MISSING
    run_dir: str = MISSING


@dataclass
class EvaluateConfig:
    """`conf/evaluate.yaml`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: EvaluateRolloutConfig = field(default_factory=lambda: EvaluateRolloutConfig())
    run: str | None = MISSING
    alpha: float = MISSING
    benchmarks: dict[str, dict[str, Any]] = MISSING
    benchmark_dir: str | None = MISSING
    decodings: list[DecodingConfig] = MISSING
    samplers: dict[str, dict[str, Any]] = MISSING
    judge: dict[str, Any] | None = MISSING
    embedder: dict[str, Any] | None = MISSING
    samples_per_prompt: int = MISSING
    seed: int = MISSING
    tokens_per_microbatch: int = MISSING
    logit_chunk_mb: float = MISSING
    bootstrap: BootstrapConfig = field(default_factory=lambda: BootstrapConfig())
    calibrate: CalibrateConfig | None = None
    output: str = MISSING


@dataclass
class EvaluateRolloutConfig:
    max_new_tokens: int = MISSING
    max_prompt_tokens: int = MISSING
    logp_gap_limit: float = MISSING
    engine: dict[str, Any] = MISSING


@dataclass
class CalibrateConfig:
    """What a figure of ours may lie off the published one."""

    table: str = MISSING
    method: str = MISSING
    sampler: str = MISSING
    tolerance: float = MISSING
    standard_errors: float = MISSING


@dataclass
class BootstrapConfig:
    draws: int = MISSING
    level: float = MISSING
    seed: int = MISSING
