"""Where a response is cut into blocks of so many tokens; the last block may be shorter."""

from __future__ import annotations

import torch
from torch import Tensor


def inner_boundaries(longest: int, block_size: int) -> int:
    """K, the places between the blocks of a response of `longest` tokens; 1 at least, of which
    `has_boundary` may find none."""
    return max(1, (longest - 1) // block_size)


def has_boundary(lengths: Tensor, boundaries: int, block_size: int) -> Tensor:
    """Whether the first, second, ... block ends before the response does, (N,) -> (N, K) bool."""
    ends = block_size * torch.arange(1, boundaries + 1, device=lengths.device)
    return ends < lengths[:, None]
