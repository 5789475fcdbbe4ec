"""`trainer.precision=bf16-true` and `16-true` for a policy that is judged by its log-probs.

Lightning's own plugin rounds everything to 16 bits: stored log-probs, the Z' head and rotary
frequencies too, whose rounding turns the phases of far positions. Here the policy's weights alone
are rounded, and its base's with them; adapters and the head keep float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn

from powerflow_lit.models.base import CopiedBase, round_weights
from powerflow_lit.module import PowerFlowModule

# what a value of `trainer.precision` rounds the weights to; any other leaves them
HALF = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class WeightsInHalf(HalfPrecision):
    """Rounds the policy's weights to 16 bits, and nothing else."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        trained = cast(PowerFlowModule, module)
        round_weights(trained.policy, self._desired_input_dtype)
        if isinstance(trained.frozen, CopiedBase):
            round_weights(trained.frozen.copy, self._desired_input_dtype)
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tensor_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def with_half_precision(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Lightning's Trainer with the plugin in place of a 16-bit `precision`."""
    half: Any = trainer.get("precision")
    if half not in HALF:
        return dict(trainer)
    plugins = [*(trainer.get("plugins") or []), WeightsInHalf(half)]
    return {**trainer, "precision": None, "plugins": plugins}
