"""Rollouts from separate `vllm serve` processes, over HTTP."""

from __future__ import annotations

import math
import shlex
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.engine import (
    SEED_STRIDE,
    EngineError,
    EngineSpec,
    LostWeightsError,
    NonFiniteRolloutError,
    OnFinished,
    check_weights,
)
from powerflow_lit.rollout.vllm_engine import as_in_files, tied_names
from powerflow_lit.rollout.vllm_server_client import (
    CONNECTIONS,
    NOT_FINITE,
    Server,
    ServerDownError,
)
from powerflow_lit.rollout.vllm_server_facts import refuse_another_model, unsent_names
from powerflow_lit.rollout.vllm_server_pool import Pool
from powerflow_lit.rollout.vllm_server_process import NCCL_ARGUMENT, OwnServer, serve_arguments
from powerflow_lit.rollout.vllm_server_weights import DiskTransfer, NcclTransfer, Transfer
from powerflow_lit.types import Completion, Sampling

T = TypeVar("T")


class VllmServerEngine:
    """Generates on servers with devices of their own; same interface and tokens as `VllmEngine`.

    A server that dies is noticed: ours is started again, another is waited for, and either gets
    the weights of the last sync again before it is asked anything. Meanwhile the others answer.
    Every response carries the label of the weights that it was sampled from, so that a server which
    somebody restarted is noticed too.

    Args:
        spec: the policy that it samples from.
        addresses: of running servers; where there is none, servers of our own are started.
        servers: of our own.
        devices: CUDA devices of our own servers, dealt evenly; a server that has several computes
            in parallel on them. Empty: whatever the process sees.
        dtype: in which the servers compute.
        max_num_seqs, kv_cache_gb, gpu_memory_utilization, enforce_eager: see `VllmEngine`.
        extra: further arguments of `vllm serve`, of our own servers.
        weight_transfer: `disk`, `nccl`, or `auto`: nccl from a GPU to servers that have it.
        weights_dir: folder for `disk`; null for one in memory, which servers on other machines
            do not see.
        start_s: seconds that a server of ours may take to start.
        request_s: seconds that an answer may take.
        wait_for_server_s: seconds that a server at an address is waited for.

    Raises:
        EngineError: a server does not start, is not there, or is of another kind.
    """

    name = "vllm_server"

    def __init__(
        self,
        spec: EngineSpec,
        *,
        addresses: Sequence[str],
        servers: int,
        devices: Sequence[int | str],
        dtype: str,
        max_num_seqs: int,
        kv_cache_gb: int,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        extra: Mapping[str, Any],
        weight_transfer: str,
        weights_dir: str | None,
        start_s: float,
        request_s: float,
        wait_for_server_s: float,
    ) -> None:
        self.dtype, self.policy_version = dtype, -1
        self._spec, self._dtype = spec, dtype
        self._weight_names = set(policy_weights(spec.policy))
        self._own_name = uuid.uuid4().hex[:12]  # in the labels of our weights
        on_gpu = spec.policy.device.type == "cuda"
        addresses, devices = of_this_rank(addresses), of_this_rank(devices)
        count = 0 if addresses else servers
        share, left = divmod(len(devices), max(count, 1))
        if left:
            raise EngineError(
                f"rollout.engine.devices={list(devices)}: {len(devices)} devices are not dealt "
                f"evenly over {count} servers"
            )
        arguments = serve_arguments(
            spec,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            tensor_parallel=share,
            nccl=weight_transfer == "nccl" or (weight_transfer == "auto" and on_gpu),
            extra=extra,
        )
        self._command = "VLLM_SERVER_DEV_MODE=1 vllm serve " + shlex.join(arguments)
        self._servers: list[Server] = []
        self._pool: Pool | None = None
        self._is_lost = False  # the weights of the last sync
        try:
            for number in range(count):
                seen = devices[number * share : (number + 1) * share]
                own = OwnServer(arguments, devices=seen, kv_cache_gb=kv_cache_gb)
                self._servers.append(Server("http://server", own, request_s=request_s))
                own.start()
            for address in addresses:
                self._servers.append(Server(address.rstrip("/"), None, request_s=request_s))
            for server in self._servers:
                self._find(server, wait_for_server_s if addresses else start_s)
            self._unsent = unsent_names(
                spec.policy, self._servers[0].facts, tied_names(spec.policy)
            )
            self._transfer = self._chosen_transfer(weight_transfer, weights_dir)
        except BaseException:
            self.close()
            raise
        self._pool = Pool(
            self._servers,
            self._transfer,
            self._look_at,
            start_s=start_s,
            wait_s=wait_for_server_s,
        )

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        check_weights(weights, self._weight_names)
        pool = self._open_pool()
        self.policy_version = -1
        sent = {name: t.detach() for name, t in weights.items() if name not in self._unsent}
        label = f"{self._own_name}:{policy_version}"
        self._transfer.take(as_in_files(self._spec.policy, sent), label)
        try:
            pool.give_weights()
        finally:
            self._transfer.release()
        self.policy_version, self._is_lost = policy_version, False

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
        distinct = sampling.distinct
        copies = sampling.samples_per_prompt // distinct
        # a server takes no more samples in a request than it decodes at once
        most = min(int(server.facts["max_num_seqs"]) for server in self._servers)
        bodies: list[dict[str, Any]] = []
        owners: list[int] = []
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            for first in range(0, distinct, most):
                owners.append(index)
                bodies.append(
                    _body(
                        prompt,
                        n=min(most, distinct - first),
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        min_p=sampling.min_p,
                        max_tokens=limit,
                        # samples of a request take the seeds from its own on, one by one
                        seed=sampling.seed + SEED_STRIDE * index + first,
                        stop_token_ids=list(self._spec.eos_ids),
                        logprobs=0 if sampling.wants_log_probs(index) else None,
                    )
                )
        parts: dict[int, dict[int, dict[str, Any]]] = {index: {} for index in range(len(prompts))}
        groups: dict[int, list[Completion]] = {}

        def arrived(number: int, answer: dict[str, Any]) -> None:
            index = owners[number]
            parts[index][number] = answer
            if len(parts[index]) < math.ceil(distinct / most):
                return
            choices = [c for part in sorted(parts[index]) for c in _in_order(parts[index][part])]
            del parts[index]
            groups[index] = [_completion(choice) for choice in choices] * copies
            if on_finished is not None:
                on_finished(index, groups[index])

        at_once = math.ceil(2 * most / min(distinct, most))
        self._ask(bodies, on_progress, arrived, at_once=at_once)
        return [groups[index] for index in range(len(prompts))]

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        fed = [[*p, *r][: self._spec.room - 1] for p, r in rows]
        bodies = [_body(ids, max_tokens=1, prompt_logprobs=0, temperature=1.0) for ids in fed]
        most = min(int(server.facts["max_num_seqs"]) for server in self._servers)
        answers: dict[int, dict[str, Any]] = {}
        self._ask(bodies, None, answers.__setitem__, at_once=most)
        scores = []
        for number, ((prompt, _), ids) in enumerate(zip(rows, fed, strict=True)):
            answer = answers[number]
            found = answer["prompt_logprobs"][len(prompt) :]
            places = zip(found, ids[len(prompt) :], strict=True)
            scores.append([float(entry[str(token)]["logprob"]) for entry, token in places])
        return scores

    def rest(self) -> None:
        """Nothing: the servers' devices are their own."""

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        for server in self._servers:
            server.close()
        self._servers = []

    def _ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        on_progress: Callable[[int, int], None] | None,
        on_answer: Callable[[int, dict[str, Any]], None],
        *,
        at_once: int,
    ) -> None:
        """Raises NonFiniteRolloutError where some logits were not finite."""
        pool = self._open_pool()
        if self._is_lost:
            raise LostWeightsError("the servers have lost the policy's weights")
        if self.policy_version < 0:
            raise EngineError("generate before the first sync: the servers' weights are random")
        try:
            pool.ask(bodies, on_progress, on_answer, at_once=min(at_once, CONNECTIONS))
        except BaseException as error:
            # also where it was broken off while the last of them was brought back
            if isinstance(error, LostWeightsError) or not pool.at_work:
                self.policy_version, self._is_lost = -1, True
            raise
        finite: list[bool] = []
        for server in pool.at_work:
            with suppress(ServerDownError):  # the next call notices
                finite += [all(worker) for worker in server.rpc("policy_logits_finite")]
        if not all(finite):
            raise NonFiniteRolloutError("some of the next tokens' logits are NaN or infinite")

    def _open_pool(self) -> Pool:
        if self._pool is None:
            raise EngineError("the engine vllm_server is closed")
        return self._pool

    def _find(self, server: Server, seconds: float) -> None:
        """Wait for a server's first answer and look at what it is."""
        if server.process is None and not server.is_up():
            print(f"{server.name} is waited for, up to {seconds:.0f} s", flush=True)
        try:
            server.wait(seconds, lambda: False)
            self._look_at(server)
        except ServerDownError as error:
            remedy = "" if server.process else f"; start it with: {self._command}"
            raise EngineError(f"{server.name} {error}{remedy}") from error

    def _look_at(self, server: Server) -> None:
        try:
            server.facts = server.rpc("policy_facts")[0]
        except EngineError as error:
            raise EngineError(f"{error}; start it with: {self._command}") from error
        refuse_another_model(
            server.name, server.facts, self._spec, dtype=self._dtype, command=self._command
        )

    def _chosen_transfer(self, chosen: str, weights_dir: str | None) -> Transfer:
        device = self._spec.policy.device
        possible = device.type == "cuda" and all(s.facts["nccl"] for s in self._servers)
        if chosen == "nccl" and not possible:
            raise EngineError(
                "rollout.engine.weight_transfer=nccl: needs a policy on a GPU and servers started "
                f"with {' '.join(NCCL_ARGUMENT)}: take disk"
            )
        if chosen == "disk" or not possible:
            weights = policy_weights(self._spec.policy).values()
            transfer = DiskTransfer(weights_dir, size=sum(t.nbytes for t in weights))
            for server in self._servers[:1]:
                if server.process is not None:
                    server.process.also_drop(transfer.folder)
            return transfer
        return NcclTransfer(device)


def of_this_rank(items: Sequence[T]) -> Sequence[T]:
    """What is this rank's of servers or devices that the ranks of a run share.

    Raises:
        EngineError: they are not dealt evenly.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if len(items) % ranks:
        raise EngineError(
            f"{len(items)} servers or devices for {ranks} ranks ({', '.join(map(str, items))}): "
            "each rank needs as many as the others"
        )
    return items[dist.get_rank() :: ranks] if ranks > 1 else items


def _body(prompt: Sequence[int], **parameters: Any) -> dict[str, Any]:
    given = {name: value for name, value in parameters.items() if value is not None}
    return {"token_ids": list(prompt), "sampling_params": {**given, "detokenize": False}}


def _in_order(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(answer["choices"], key=lambda choice: choice["index"])


def _completion(choice: Mapping[str, Any]) -> Completion:
    entries = choice["logprobs"]["content"] if choice["logprobs"] else ()
    log_probs = tuple(_number(entry["logprob"]) for entry in entries)
    cut = choice["finish_reason"] == "length"
    return Completion(tuple(choice["token_ids"]), log_probs, truncated=cut)


def _number(log_prob: float) -> float:
    return math.nan if log_prob == NOT_FINITE else log_prob
