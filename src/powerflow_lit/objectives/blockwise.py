"""Length-averaged trajectory balance over blocks of a response instead of the whole (ours).

Cut a response of L tokens into blocks (i, j] of `block_size` tokens, the last one shorter. With
lambda = log Z'(q), the price of a token, the residual of a block is, in nats per token,

    d_ij = [log V_i - log V_j + sum_{i<t<=j} (log pi_t - alpha log p_base_t + lambda)
            - (j = L) alpha L psi] / (j - i),

where V_i = V(y_<=i) is the flow that still leaves the prefix of i tokens, and log V = 0 at the
start and at the end of a response, cut at the cap or not. The loss is the mean of d^2 over tokens.

**One block is LA-TB.** The sum over blocks telescopes: sum (j - i) d_ij = L d with d the residual
of eq. 7. So the mean of d_ij over tokens is d, and the mean of d_ij^2 is d^2 plus the variance of
d_ij over the response's tokens. That variance is all that stands here; it is 0 for one block, does
not depend on log Z', and leaves every mode of `log_z=` as it is.

**It has LA-TB's fixed point.** If all d_ij of all y are 0, so is every d, that is
pi(y) = p_base(y)^alpha exp(alpha L psi - lambda L): LA-TB's target, with the lambda at which it
sums to 1. Conversely, let pi be this target, and pi(x) the sum of pi(y) over the y that begin with
the prefix x. Put V(x) = pi(x) / (p_base(x)^alpha exp(-lambda |x|)): a function of the prefix, and 1
for the empty one. The blocks before the last have d = 0, since pi_t are the ratios of pi(x); so has
the last, since pi(y) / (p_base(y)^alpha exp(-lambda L)) = exp(alpha L psi). So the loss is 0 for
one policy, one lambda and one V at the prefixes where blocks meet,

    V(x) = sum_{y begins with x} p_base(y | x)^alpha exp(-lambda (L - |x|) + alpha L psi).

**Why psi stands in the last block.** Spread evenly over the tokens it would have the same sum, but
a prefix has one V whatever comes after it: where one continuation earns the penalty and another
does not, the blocks before ask for log V's that differ by alpha |x| psi, and no policy has zero
loss.

The form of the flows is that of forward-looking subtrajectory balance (Pan et al. 2023, Madan et
al. 2023), with LA-TB's price of a token in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_lit.blocks import has_boundary, inner_boundaries
from powerflow_lit.objectives.inputs import (
    Alpha,
    LossInputs,
    NonFiniteInputError,
    ObjectiveError,
    lengths,
    per_token,
)


@dataclass(frozen=True)
class BlockVariance:
    """Variance over a response's tokens of its blocks' residuals, (N,): `spread` of a balance
    objective whose mismatch is LA-TB's. Blocks of one token with V = 1: `token_variance`.

    Attributes:
        block_size: tokens of a block.
    """

    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ObjectiveError(f"block_size={self.block_size}: must be 1 token or more")

    def __call__(self, inputs: LossInputs, *, alpha: Alpha) -> Tensor:
        """
        Args:
            inputs: checked ones; `log_flow` (N, K) is log V after the first, second, ... block, and
                may hold anything where a response has ended by then.

        Raises:
            ObjectiveError: no log_flow, or one of another block size.
            NonFiniteInputError: NaN or infinity in a log_flow that counts.
        """
        length, flow = lengths(inputs.mask), self._flow(inputs)  # (N,), (N, K)
        ratio = torch.where(
            inputs.mask, inputs.log_pf - per_token(alpha) * inputs.log_p_base, 0.0
        )  # (N, T)
        blocks = flow.shape[1] + 1
        total = self._per_block(ratio, blocks)  # (N, blocks)
        size = self._per_block(inputs.mask.to(ratio.dtype), blocks)
        none = flow.new_zeros(len(flow), 1)  # log V at the start and at the end
        total = total + torch.cat([none, flow], 1) - torch.cat([flow, none], 1)
        last = (length - 1) // self.block_size
        penalty = alpha * length * inputs.format_penalty
        total = total.scatter_add(1, last[:, None], -penalty[:, None])
        residual = total / size.clamp(min=1)  # less log Z', which all have
        share = size / length[:, None]
        mean = (share * residual).sum(1, keepdim=True)
        return (share * (residual - mean) ** 2).sum(1)

    def _flow(self, inputs: LossInputs) -> Tensor:
        """log V at the boundaries, 0 where there is none."""
        shape = len(inputs.mask), inner_boundaries(inputs.mask.shape[1], self.block_size)
        flow = inputs.log_flow
        if flow is None or flow.shape != shape:
            given = None if flow is None else tuple(flow.shape)
            raise ObjectiveError(
                f"log_flow has shape {given}, blocks of {self.block_size} tokens need {shape}: "
                "strategy.flow must be set (strategy=la_tb_blocks)"
            )
        inside = has_boundary(lengths(inputs.mask), shape[1], self.block_size)
        if bool((inside & ~flow.isfinite()).any()):
            raise NonFiniteInputError("log_flow holds a NaN or an infinity at a block's boundary")
        return torch.where(inside, flow, 0.0)

    def _per_block(self, x: Tensor, blocks: int) -> Tensor:
        """Sums of each block's tokens, (N, T) -> (N, blocks)."""
        missing = blocks * min(self.block_size, x.shape[1]) - x.shape[1]
        return torch.nn.functional.pad(x, (0, missing)).unflatten(1, (blocks, -1)).sum(2)
