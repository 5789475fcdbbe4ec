"""How often a policy ranks two rollouts of a prompt otherwise than the base does."""

from __future__ import annotations

import torch
from torch import Tensor


def inversion_rate(x: Tensor, y: Tensor, group: Tensor, *, tie: float) -> Tensor:
    """Share of the pairs of a group that x and y order differently, over all groups, ().

    With x = B = log p_base(y) and y = T = log pi_theta(y) of rollouts i, j of one prompt this
    estimates the pairwise inversion rate P[(B_i - B_j)(T_i - T_j) < 0], without bias where they
    were drawn from pi_theta. It is 0 for every pi_theta that is a power of the base. The protocol
    of the paper's 0.09 is not known to us. 0 where no group has a pair.

    Args:
        x, y: (N,).
        group: (N,) equal for what is compared.
        tie: differences up to this are none: equal responses come out of two passes with rounding.
    """
    same = group[:, None] == group
    first, second = torch.nonzero(same.triu(1), as_tuple=True)
    dx, dy = x[first] - x[second], y[first] - y[second]
    inverted = (dx * dy < 0) & (dx.abs() > tie) & (dy.abs() > tie)
    return inverted.to(x.dtype).sum() / max(len(first), 1)
