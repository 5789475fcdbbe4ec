"""Entropy minimisation without RL: the policy's own token entropy is the loss (One-shot EM)."""

from __future__ import annotations

from dataclasses import dataclass

from powerflow_lit.objectives.balance import UNWEIGHTED, trajectory_metrics
from powerflow_lit.objectives.inputs import Alpha, LossInputs, LossOutput, ObjectiveError, checked
from powerflow_lit.objectives.policy_gradient import Reduction, reduced


@dataclass(frozen=True)
class EntropyObjective:
    """The token entropy of softmax(logits / `entropy_temperature`) over the responses, nats.

    No gradient goes through the sampling, and alpha is not used (One-shot EM, arXiv 2505.20282).

    Attributes:
        entropy_temperature: the module asks the policy for the entropies at it.
        reduction: `all_tokens` is the mean over the tokens of the update, as released.
    """

    entropy_temperature: float
    reduction: Reduction
    uses_log_z: bool = False
    uses_log_p_old: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.entropy_temperature < float("inf"):
            raise ObjectiveError(
                f"entropy_temperature={self.entropy_temperature}: must be positive, e.g. 0.5"
            )
        if self.reduction == "constant_length":
            raise ObjectiveError("reduction 'constant_length' is one of rewards: take all_tokens")

    def __call__(self, inputs: LossInputs, *, alpha: Alpha) -> LossOutput:
        """
        Raises:
            ObjectiveError: no entropies; a format penalty, for which there is no place.
            NonFiniteInputError: NaN or infinity inside the mask.
        """
        inputs = checked(inputs)
        if inputs.token_entropy is None:
            raise ObjectiveError("entropy minimisation needs token_entropy, which is None")
        if bool((inputs.format_penalty != 0).any()):
            raise ObjectiveError(
                "format_penalty with entropy minimisation: there is no reward to add it to; set "
                "strategy.format_penalty=0"
            )
        loss = reduced(inputs.token_entropy, inputs.mask, self.reduction).mean()
        # a trajectory's own mean, nats a token
        residual = reduced(inputs.token_entropy, inputs.mask, "token_mean").detach()
        weights = UNWEIGHTED(inputs)
        return LossOutput(loss, trajectory_metrics(inputs, residual, weights), residual)
