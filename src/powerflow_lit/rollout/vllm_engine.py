"""Rollouts from an in-process vLLM engine. The one file that imports vllm."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.sharding import whole
from powerflow_lit.rollout.engine import (
    SEED_STRIDE,
    EngineError,
    EngineSpec,
    NonFiniteRolloutError,
    OnFinished,
    check_weights,
    refuse_ranks,
)
from powerflow_lit.rollout.host_state import classes_kept, group_kept, trainer_state_kept
from powerflow_lit.types import Completion, Sampling


def tied_names(model: nn.Module) -> set[str]:
    """Names under which the state dict holds a parameter for a second time."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def as_in_files(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of the hub's files, which are those that vLLM reads.

    In memory `transformers` has other names for some, and one tensor for a mixture's experts.
    """
    return dict(revert_weight_conversion(model, dict(weights)))


class FiniteLogits:
    """Whether all logits were numbers since the last `take`; a forward hook of the layer.

    Where no log-probs are asked for, nothing else would tell: vLLM samples some token from NaN.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None  # on the device, so that no step waits for it

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor | None) -> None:
        if logits is not None:
            finite = logits.sum(dtype=torch.float32).isfinite()
            self._finite = finite if self._finite is None else self._finite & finite

    def take(self) -> bool:
        finite, self._finite = self._finite, None
        return finite is None or bool(finite)


class VllmEngine:
    """A vLLM engine in the trainer's process, its weights replaced in place by `sync`.

    The engine starts with random weights and must be synced before it generates: a model with
    tied embeddings is built untied, because vLLM's in-place reload leaves a tied `lm_head` stale.

    Args:
        spec: the policy that it samples from.
        dtype: `float32` (CPU), `bfloat16` (GPU).
        max_num_seqs: sequences decoded at once.
        kv_cache_gb: key-value cache on the CPU, GB; on a GPU `gpu_memory_utilization` counts.
        enforce_eager: no compilation or CUDA graphs.
        sleep: on a GPU, give the engine's memory to the trainer while it makes updates.
        tensor_parallel: ranks of the trainer, neighbours, that hold one engine's weights in parts;
            they must build, sync and ask it together (`shared_engine`).
        extra: further `vllm.LLM` arguments.

    Raises:
        EngineError: vLLM is not installed or refuses the model.
    """

    name = "vllm"

    def __init__(
        self,
        spec: EngineSpec,
        *,
        dtype: str,
        max_num_seqs: int,
        kv_cache_gb: int,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        sleep: bool,
        tensor_parallel: int,
        extra: Mapping[str, Any],
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gb))
        arguments = {
            "model": spec.model_path,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "hf_overrides": {"tie_word_embeddings": False},
            "max_model_len": spec.room,
            "seed": spec.seed,
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager,
            "trust_remote_code": spec.trust_remote_code,
            "disable_log_stats": True,
            "generation_config": "vllm",
            **_launcher(tensor_parallel),
            **extra,
        }
        self._sleeps = sleep and torch.cuda.is_available()
        self._is_asleep = False
        if self._sleeps:
            arguments["enable_sleep_mode"] = True
        if torch.cuda.is_available():
            arguments.setdefault("gpu_memory_utilization", gpu_memory_utilization)
        else:
            # vLLM 0.32 on the CPU fails on a seeded request whose prompt is prefilled in chunks
            # ("CPU Generator does not use offset")
            arguments.setdefault("enable_chunked_prefill", False)
            arguments.setdefault("max_num_batched_tokens", max(8192, spec.max_model_len))
        self.dtype = dtype
        self._group = dist.group.WORLD if dist.is_initialized() else None
        with trainer_state_kept():
            os.environ.update(_place())
            try:
                import vllm
            except ImportError as error:
                raise EngineError(
                    f"rollout=vllm needs vLLM, which does not import here ({error}): run "
                    "`make install`, or `pip install .[vllm]` on a CUDA machine, or set rollout=hf"
                ) from error
            self._vllm: Any = vllm
            self._llm: Any = None
            try:
                with classes_kept(spec.policy, self._apply):
                    self._llm = vllm.LLM(**arguments)
            except (ValueError, TypeError, RuntimeError, OSError) as error:
                raise EngineError(f"vLLM refuses {spec.model_path}: {_why(error, spec)}") from error
        self.policy_version = -1
        self._weight_names = set(policy_weights(spec.policy))
        try:
            self._unsent = self._unknown_names(spec.policy)
        except EngineError:
            self.close()
            raise
        self._policy, self._eos_ids = spec.policy, spec.eos_ids
        self._room = spec.room
        self._requests = 0
        self._logits = FiniteLogits()
        self._apply(self._watch_logits)

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        check_weights(weights, self._weight_names)
        with trainer_state_kept():
            sent = {name: t.detach() for name, t in weights.items() if name not in self._unsent}
            named = as_in_files(self._policy, sent).items()
            iterator = ((name, whole(tensor)) for name, tensor in named)
            # room for the weights first: the trainer's caches may fill the rest
            if self._is_asleep:
                self._llm.wake_up(tags=["weights"])
            try:
                self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
            except ValueError as error:
                raise EngineError(f"vLLM refuses the policy's weights: {error}") from error
            if self._is_asleep:
                torch.cuda.empty_cache()
                self._llm.wake_up(tags=["kv_cache"])
                self._is_asleep = False
            self._llm.reset_prefix_cache()  # its keys and values are the old weights'
        self.policy_version = policy_version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        limits = max_new_tokens or [sampling.max_new_tokens] * len(prompts)
        # vLLM refuses several greedy samples of a prompt, which would be copies
        distinct = sampling.distinct
        copies = sampling.samples_per_prompt // distinct
        requests = [
            (
                list(prompt),
                self._vllm.SamplingParams(
                    n=distinct,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    min_p=sampling.min_p,
                    max_tokens=limit,
                    seed=sampling.seed + SEED_STRIDE * index,
                    stop_token_ids=list(self._eos_ids),
                    logprobs=0 if sampling.wants_log_probs(index) else None,
                    detokenize=False,
                    output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
                ),
            )
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        groups: dict[int, list[Completion]] = {}

        def finished(number: int, result: Any) -> None:
            groups[number] = [_completion(output) for output in result.outputs] * copies
            if on_finished is not None:
                on_finished(number, groups[number])

        self._run(requests, on_progress, finished)
        return [groups[number] for number in range(len(prompts))]

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        parameters = self._vllm.SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=1.0
        )
        fed = [[*p, *r][: self._room - 1] for p, r in rows]
        results: dict[int, Any] = {}
        self._run([(ids, parameters) for ids in fed], None, results.__setitem__)
        scores = []
        for number, ((prompt, _), ids) in enumerate(zip(rows, fed, strict=True)):
            result = results[number]
            places = zip(result.prompt_logprobs[len(prompt) :], ids[len(prompt) :], strict=True)
            scores.append([entry[token].logprob for entry, token in places])
        return scores

    def rest(self) -> None:
        if self._sleeps and not self._is_asleep:
            with trainer_state_kept():
                self._llm.sleep(level=2)  # weights and cache are gone, not moved
            self._is_asleep, self.policy_version = True, -1

    def close(self) -> None:
        # LLM has no shutdown of its own; without this the engine's threads and memory stay
        if self._llm is not None:
            with trainer_state_kept(), group_kept(self._group):
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _unknown_names(self, policy: PreTrainedModel) -> set[str]:
        """Names of the policy's weights that the engine's model has no place for.

        Raises:
            EngineError: some of the policy's weights would be lost in the engine.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead as Head

        (has_bias,) = self._llm.apply_model(
            lambda m: [x.bias is not None for x in m.modules() if isinstance(x, Head)]
        )
        if not has_bias:  # Gemma 2 knows the input embeddings alone
            return tied_names(policy)
        if getattr(policy.get_output_embeddings(), "bias", None) is not None and not any(has_bias):
            raise EngineError(
                f"vLLM loses the output layer's bias of {type(policy).__name__} when weights are "
                "replaced: set rollout=hf"
            )
        (experts,) = self._llm.apply_model(
            lambda m: any(type(x).__name__ == "RoutedExperts" for x in m.modules())
        )
        if experts and not torch.cuda.is_available():
            raise EngineError(
                f"vLLM on the CPU muddles the experts of {type(policy).__name__} when weights are "
                "replaced: set rollout=hf, or use a GPU"
            )
        return set()

    def _watch_logits(self, model: nn.Module) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        for module in model.modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(self._logits)

    def _apply(self, function: Callable[[nn.Module], None]) -> None:
        """Call the function with the engine's model, if one was built."""
        if self._llm is not None:
            self._llm.apply_model(function)

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise EngineError("the vLLM engine is closed")
        return self._llm.llm_engine

    def _run(
        self,
        requests: Sequence[tuple[list[int], Any]],
        on_progress: Callable[[int, int], None] | None,
        on_result: Callable[[int, Any], None],
    ) -> None:
        """Results of (prompt ids, SamplingParams), each with its number as soon as it is there; an
        interrupt aborts what is left.

        Raises:
            NonFiniteRolloutError: some logits were not finite.
        """
        if self.policy_version < 0:
            raise EngineError("generate before the first sync: the engine's weights are random")
        engine = self._engine
        first = self._requests
        self._requests += len(requests)
        samples = tokens = 0
        with trainer_state_kept():
            try:
                for offset, (token_ids, parameters) in enumerate(requests):
                    prompt = {"prompt_token_ids": token_ids}
                    engine.add_request(str(first + offset), prompt, parameters)
                while engine.has_unfinished_requests():
                    for result in engine.step():
                        if not result.finished:
                            continue
                        on_result(int(result.request_id) - first, result)
                        samples += len(result.outputs)
                        tokens += sum(len(output.token_ids) for output in result.outputs)
                    if on_progress is not None:  # a run that is asked to stop raises here
                        on_progress(samples, tokens)
            except BaseException:
                engine.abort_request([str(first + i) for i in range(len(requests))])
                raise
            finally:
                finite = self._logits.take()
        if not finite:
            raise NonFiniteRolloutError("some of the next tokens' logits are NaN or infinite")


def _launcher(tensor_parallel: int) -> dict[str, Any]:
    """Arguments of an engine within one rank of several: its processes are the trainer's own.

    One for itself alone is on the device of its rank; by default vLLM would take the first one.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    refuse_ranks(tensor_parallel, ranks)
    if ranks == 1 or (tensor_parallel == 1 and not torch.cuda.is_available()):
        return {}
    return {
        "tensor_parallel_size": tensor_parallel,
        "distributed_executor_backend": "external_launcher",
    }


def _place() -> dict[str, str]:
    """What the external launcher reads of the environment; the group is the trainer's."""
    if not dist.is_initialized():
        return {}
    on_gpu = torch.cuda.is_available()
    local = torch.cuda.current_device() if on_gpu else dist.get_rank()
    return {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(local)}


def _why(error: Exception, spec: EngineSpec) -> str:
    """What vLLM says, in a line, or what it means where the sequences are too long."""
    context = spec.context
    if context is not None and spec.max_model_len > context and "max_model_len" in str(error):
        return (
            f"prompt and response may take {spec.max_model_len} tokens together, the model's "
            f"context is {context}: lower rollout.max_new_tokens or rollout.max_prompt_tokens"
        )
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = [line for line in lines if line and "validation error for" not in line]
    return said[0] if said else type(error).__name__


def _completion(output: Any) -> Completion:
    token_ids = tuple(output.token_ids)
    steps = zip(token_ids, output.logprobs, strict=True) if output.logprobs is not None else ()
    log_probs = tuple(step[token].logprob for token, step in steps)
    return Completion(token_ids, log_probs, truncated=output.finish_reason == "length")
