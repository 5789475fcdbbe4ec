"""Hidden states between the blocks of responses, out of the pass that yields their log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_lit.blocks import has_boundary, inner_boundaries
from powerflow_lit.types import TokenBatch


@dataclass(frozen=True)
class Blocks:
    """How the N responses of a batch are cut."""

    lengths: Tensor  # (N,) tokens of response
    block_size: int
    boundaries: int  # K, of the longest response

    @classmethod
    def of(cls, batch: TokenBatch, block_size: int) -> Blocks:
        lengths = batch.response_lengths
        return cls(lengths, block_size, inner_boundaries(int(lengths.max()), block_size))

    def states(self, predictors: Tensor, rows: Tensor) -> Tensor:
        """The state after each block but a response's last, 0 where there is none: (n, K, h).

        Args:
            predictors: (R, h) states that predict each token of the responses, row after row: that
                of token i has seen the i tokens before it.
            rows: (n,) which responses these are.
        """
        lengths = self.lengths[rows]
        first = lengths.cumsum(0) - lengths
        after = self.block_size * torch.arange(1, self.boundaries + 1, device=rows.device)
        inside = has_boundary(lengths, self.boundaries, self.block_size)  # (n, K)
        found = predictors[torch.where(inside, first[:, None] + after, 0)]
        return torch.where(inside[..., None], found, 0.0)
