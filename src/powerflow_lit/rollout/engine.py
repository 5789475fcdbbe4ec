"""What the rest of the project knows of a generation engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from powerflow_lit.diverged import DivergedError
from powerflow_lit.mendable import MendableError
from powerflow_lit.models.sharding import all_finite, whole
from powerflow_lit.types import Completion, Sampling

# Samples of one prompt take seeds s, s+1, ...: prompts must be further apart than that.
SEED_STRIDE = 4096
Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
OnFinished = Callable[[int, Sequence[Completion]], None]


class EngineError(MendableError, RuntimeError):
    """The engine cannot do what was asked; the message says what to change."""


class LostWeightsError(EngineError):
    """The engine has lost the weights that it was given; a sync brings them back."""


class NonFiniteWeightsError(EngineError, DivergedError):
    """The policy's weights are not numbers any more: the run has diverged."""


class NonFiniteRolloutError(EngineError, DivergedError):
    """The policy gives log-probs that are not numbers, though its weights are."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine must know of the policy that it samples from."""

    policy: PreTrainedModel
    model_path: str  # folder or hub id whose config shapes the engine
    pad_id: int
    eos_ids: tuple[int, ...]  # the tokens that end a response, each
    max_model_len: int  # prompt and response, tokens
    seed: int
    trust_remote_code: bool

    @property
    def context(self) -> int | None:
        """Tokens that the model was built for; None where its config does not say."""
        return getattr(self.policy.config.get_text_config(), "max_position_embeddings", None)

    @property
    def room(self) -> int:
        """Tokens a request may take: scoring the longest row samples one more, if the model can."""
        return self.max_model_len + (self.max_model_len != self.context)


class RolloutEngine(Protocol):
    """Samples responses from a copy of the policy that `sync` brings up to date."""

    @property
    def name(self) -> str: ...

    @property
    def policy_version(self) -> int:
        """Of the weights it holds; -1 before the first sync."""
        ...

    @property
    def dtype(self) -> str:
        """In which it computes, e.g. `float32`."""
        ...

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Replace all weights. `weights` is the policy's whole state dict.

        Of a policy that is spread over ranks these are parts: all ranks sync together, and each
        tensor is made `whole` as it is needed, one after the other.

        Raises:
            EngineError: a name is missing or unknown.
            NonFiniteWeightsError: a tensor is not finite.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """`samples_per_prompt` completions for each prompt's token ids, reproducible by seed.

        Sample j of prompt i is drawn from the seed `sampling.seed + i * SEED_STRIDE + j` alone, so
        that a part of the prompts has the same responses by itself (see `seed_from`).
        `on_progress(responses finished, tokens of those)` is called for each token or so; what it
        raises ends the work, and leaves the engine usable.
        `max_new_tokens` gives each prompt a limit of its own in place of the sampling's.
        `on_finished(number of the prompt, its completions)` is called for each prompt as soon as
        all of its completions are there, in the caller's thread.
        Whether log-probs are asked for (`sampling.log_probs`) changes no token.
        """
        ...

    def score(self, rows: Sequence[Row]) -> list[list[float]]:
        """Log-probs (nats) of given responses after given prompts, one list a row.

        A row that fills the model's whole context may lack its last token.
        """
        ...

    def rest(self) -> None:
        """Give memory back that the next `sync` takes again; may do nothing.

        An engine that did has no weights: its `policy_version` is -1.
        """
        ...

    def close(self) -> None:
        """Free the engine; safe to call twice."""
        ...


def seed_from(seed: int, first: int) -> int:
    """The seed for the prompts from the `first`-th on, as if those before were there too."""
    return seed + SEED_STRIDE * first


def check_weights(weights: Mapping[str, Tensor], expected: set[str]) -> None:
    """Refuse a partial or non-finite set of weights before any of it reaches an engine.

    Raises:
        EngineError: names the first missing or unknown tensor.
        NonFiniteWeightsError: names the first that holds NaN or infinity.
    """
    if missing := expected - weights.keys():
        raise EngineError(f"sync refused: {len(missing)} weights missing, e.g. {min(missing)}")
    if unknown := weights.keys() - expected:
        raise EngineError(f"sync refused: {len(unknown)} unknown weights, e.g. {min(unknown)}")
    for name, tensor in weights.items():
        if not all_finite([tensor]):
            bad = int((~whole(tensor).isfinite()).sum())
            raise NonFiniteWeightsError(
                f"sync refused: {name} holds NaN or infinity at {bad} of {tensor.numel()} places: "
                "the policy has diverged; try a lower optimizer.lr"
            )


def refuse_ranks(size: int, world: int) -> None:
    """Raises EngineError where so many ranks do not divide into groups of `size`."""
    if world % size:
        raise EngineError(
            f"rollout.engine.tensor_parallel={size}: {world} rank{'s' * (world > 1)} of the "
            "trainer cannot be divided into groups that share an engine: take a divisor of "
            "trainer.devices"
        )
