"""Gradient checkpointing for a policy that is trained in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from powerflow_lit.models.errors import ModelError


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of the model's layers for the backward pass, which computes them again.

    Raises:
        ModelError: the architecture has no such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model.gradient_checkpointing=true: {type(model).__name__} does not support it; "
            "set it to false and lower tokens_per_microbatch instead"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_checkpointed, layer)  # type: ignore[assignment]
    without_dropout(model)


def without_dropout(model: nn.Module) -> None:
    """Evaluation mode, in which checkpointed layers still checkpoint.

    Log-probs must be those of the sampled policy, so a policy is trained without dropout. But
    transformers' layers checkpoint only while their own `training` is True: the flag of these
    layers alone is raised, and lowered while they run.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True  # not train(), which would wake the dropout below


def _checkpointed(layer: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(
        partial(_in_evaluation, layer, function),
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in it is random
    )


def _in_evaluation(layer: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    layer.training = False
    try:
        return function(*arguments)
    finally:
        layer.training = True
