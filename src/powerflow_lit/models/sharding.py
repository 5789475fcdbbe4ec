"""A model whose weights are spread over all ranks (FSDP2, `torch.distributed.fsdp`).

Each rank holds a part of every tensor, cut along its first dimension. A layer is made whole just
before it is used and cut again right after, in the forward as in the backward pass, where its
gradient is averaged over the ranks too. So every pass is one that all ranks make together: where
one makes more passes than another, both wait for ever. What stands here sees to their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from powerflow_lit import ranks
from powerflow_lit.models.errors import ModelError

Result = TypeVar("Result")


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Spread the model's weights over the ranks of a one-dimensional mesh, in place.

    Each layer is a unit of its own, all else (embeddings, last norm, output layer, tied or not)
    is one together. Parameters are moved to the mesh's device unit by unit, so that a device never
    holds the whole model.

    Raises:
        ModelError: the architecture has no layers to cut by.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"trainer=fsdp: {type(model).__name__} has no layers that it could be cut by; "
            "take trainer=ddp"
        )
    for layer in reversed(layers):  # what lies within another first
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # the output layer is large, and scoring passes have no backward pass that would cut it again
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.run_together = MethodType(_call, model)
    register_fsdp_forward_method(model, "run_together")


def _call(model: nn.Module, function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called with it."""
    return isinstance(model, FSDPModule)


def in_one_pass(model: Any, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, which may use all of the model, as a forward pass of the model.

    The log-probs here go past the model's own `forward`, from its trunk to its output layer's
    weight, which FSDP makes whole within its hooks alone. The function must return tensors, all
    that the gradient comes back through.
    """
    if not is_sharded(model):
        return function(*arguments)
    # autocast would keep a rounded copy of every weight until the step's end, the whole model in
    # the end, and those of passes without gradient would cut off the gradient of the others
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return model.run_together(function, *arguments)  # type: ignore[no-any-return]
    finally:
        torch.set_autocast_cache_enabled(kept)


def passes_of_all_ranks(model: nn.Module, passes: int) -> int:
    """How many passes this rank must make where its own rows need so many: the most of any."""
    return ranks.greatest(passes) if is_sharded(model) else passes


def agreed(in_step: bool, work: Callable[[], Result]) -> Result:
    """`work()`, which a rank does for itself between what it does together with others.

    Where ranks are `in_step`, because they share a model or an engine, what it raises on one is
    raised on all (`ranks.gathered`): the others would wait for its next pass for ever. `work` must
    hold no pass of a shared model.
    """
    if not in_step:
        return work()
    results: list[Result] = []
    ranks.gathered(lambda: results.append(work()))
    return results[0]


@dataclass(frozen=True)
class Deferred:
    """A pass made without gradient, whose backward pass follows that of the loss.

    Checkpointed passes are computed again within the loss's backward pass, where FSDP keeps all
    layers whole until each is done: the whole model at once. A pass computed again after it is an
    ordinary one, and its gradients are the same: those of its outputs are known by then.
    """

    outputs: tuple[Tensor | None, ...]  # leaves of the loss's graph
    run: Callable[[], tuple[Tensor | None, ...]]  # yields the outputs again, with gradient

    @classmethod
    def of(cls, run: Callable[[], tuple[Tensor | None, ...]]) -> Deferred:
        with torch.no_grad():
            outputs = run()
        return cls(tuple(None if x is None else x.requires_grad_() for x in outputs), run)

    def backward(self, context: Callable[[], Any]) -> None:
        """Add to the weights' gradients; `context` is the forward pass's, e.g. autocast."""
        with context():
            again = self.run()
        live, gradients = [], []
        for output, leaf in zip(again, self.outputs, strict=True):
            if output is not None and leaf is not None:
                live.append(output)
                # also where the loss does not depend on it: other ranks' passes wait for this one
                gradients.append(torch.zeros_like(output) if leaf.grad is None else leaf.grad)
        torch.autograd.backward(live, gradients)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, which must all call it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part as a tensor that is spread as another is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite, those that other ranks hold included."""
    finite, spread = True, False
    for tensor in tensors:
        spread = spread or isinstance(tensor, DTensor)
        finite = finite and bool(part_of(tensor).isfinite().all())
    return not ranks.greatest(int(not finite)) if spread else finite


def average_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Average the gradients of a module that every rank holds whole, in one message."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    # zeros where a rank has none: the message must be as long on all
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=mesh.get_group())
    flat /= mesh.size()
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parts]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()
