"""The Z' head: an amortised, prompt-conditioned estimate of log Z' (or log Z)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pool = Literal["mean", "last"]  # hidden state that the head reads: of the prompt tokens


class ZHead(nn.Module):
    """MLP on pooled prompt hidden states, (N, h) -> (N,) nats.

    The last layer's weight starts at zero, so that the first estimate is its bias alone, which
    `set_bias` takes from the first refill. Design after FlowRL (two GELU blocks with LayerNorm).
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, width),
            nn.GELU(),
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width),
        )
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, prompt_state: Tensor) -> Tensor:
        # in float32 under autocast too: in bfloat16 a log Z of 5 nats comes in steps of 0.03
        with torch.autocast(prompt_state.device.type, enabled=False):
            return self.out(self.body(prompt_state.to(self.out.weight.dtype))).squeeze(-1)

    @torch.no_grad()
    def set_bias(self, log_z: float) -> None:
        """Start the estimate at `log_z` nats for every prompt."""
        self.out.bias.fill_(log_z)
