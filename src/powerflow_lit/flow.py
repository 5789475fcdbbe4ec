"""log V of the prefixes at which blockwise balance cuts a response: a head beside that of log Z."""

from __future__ import annotations

from torch import Tensor, nn

from powerflow_lit import ranks
from powerflow_lit.blocks import inner_boundaries
from powerflow_lit.models.z_head import ZHead
from powerflow_lit.types import TrajectoryBatch


class FlowHead(nn.Module):
    """An MLP on the policy's hidden state after each block, trained as that of log Z is.

    It starts at 0: the loss is then that of the blocks' own log-probs.

    Args:
        width: of its layers.
        detach: keep its gradient from the policy's trunk.
    """

    def __init__(self, *, width: int, detach: bool) -> None:
        super().__init__()
        self.width, self.detach = width, detach

    def build(self, hidden_size: int) -> None:
        """Told once, before training: the width of the states."""
        self.head = ZHead(hidden_size, self.width)

    def forward(self, states: Tensor) -> Tensor:
        """(N, K, h) -> (N, K) nats."""
        log_flow: Tensor = self.head(states.detach() if self.detach else states)
        return log_flow

    def of_all(self, states: Tensor, batch: TrajectoryBatch, block_size: int) -> Tensor:
        """log V of every rank's rows, (N, K); the gradient is of this rank's own.

        Args:
            states: of this rank's rows.
        """
        rows = ranks.share_of_groups(batch.prompt_index)
        longest = int(batch.tokens.response_lengths.max())
        shape = len(batch.prompt_index), inner_boundaries(longest, block_size)
        return ranks.gather_rows(self(states), rows, shape)
