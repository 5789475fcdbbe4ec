"""The frozen base p_base: a second copy of the policy, or the policy with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from powerflow_lit.models.lora import PlainWeights, adapter_off, is_lora, plain_copy, policy_weights
from powerflow_lit.models.sharding import shard


class FrozenBase(Protocol):
    """Yields a model to score with; what it yields is the base only within the `with` block."""

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        """`with base.model() as m: ...`"""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """All that an engine must be given to sample from it, as `policy_weights` of the policy."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what the base holds beside the policy."""
        ...

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread what the base holds beside the policy over the ranks (`sharding.shard`)."""
        ...


class CopiedBase:
    """A copy of the policy as it is now, which nothing trains.

    Args:
        dtype: of the copy; bfloat16 halves its memory and rounds its log-probs.
    """

    def __init__(self, policy: PreTrainedModel, dtype: torch.dtype) -> None:
        self.copy = plain_copy(policy)
        round_weights(self.copy, dtype)

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        yield self.copy

    def weights(self) -> Mapping[str, Tensor]:
        return policy_weights(self.copy)

    def to(self, device: torch.device) -> None:
        nn.Module.to(self.copy, device)

    def shard(self, mesh: DeviceMesh) -> None:
        shard(self.copy, mesh)


class AdapterOffBase:
    """The policy itself with its adapter off: no second copy, and no rounding between the two."""

    def __init__(self, policy: PreTrainedModel) -> None:
        self._policy = policy

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        with adapter_off(self._policy):
            yield self._policy

    def weights(self) -> Mapping[str, Tensor]:
        return PlainWeights(self._policy).tensors

    def to(self, device: torch.device) -> None:
        """Nothing: it moves with the policy."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Nothing: it is spread with the policy."""


def frozen_base(policy: PreTrainedModel, dtype: torch.dtype | None) -> FrozenBase:
    """The base of a policy that has not been trained yet; dtype None: the policy's own."""
    return AdapterOffBase(policy) if is_lora(policy) else CopiedBase(policy, dtype or policy.dtype)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights in place, but neither an adapter's nor buffers.

    `model.to(dtype)` would round rotary frequencies too, and so turn the phases of far positions.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
