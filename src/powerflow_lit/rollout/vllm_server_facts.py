"""Whether a server generates for the policy: from what its workers say of their model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from powerflow_lit.rollout.engine import EngineError, EngineSpec


def refuse_another_model(
    name: str, facts: Mapping[str, Any], spec: EngineSpec, *, dtype: str, command: str
) -> None:
    """Raises EngineError where the server at `name` cannot stand in for the policy.

    Args:
        facts: see `PolicyWorker.policy_facts`.
        command: that would start a right one.
    """
    shape = spec.policy.config.get_text_config()
    for fact, ours in (
        ("vocab_size", shape.vocab_size),
        ("hidden_size", shape.hidden_size),
        ("layers", shape.num_hidden_layers),
    ):
        if facts[fact] != ours:
            raise EngineError(
                f"{name} serves another model, {facts['model']}: its {fact} is {facts[fact]}, "
                f"the policy's is {ours}"
            )
    remedy = f"start it with: {command}"
    if facts["max_model_len"] < spec.room:
        raise EngineError(
            f"{name} takes {facts['max_model_len']} tokens, prompt and response may take "
            f"{spec.room} together (with one more to score): {remedy}"
        )
    if facts["dtype"] != dtype:
        raise EngineError(
            f"{name} computes in {facts['dtype']}, rollout.engine.dtype={dtype}: {remedy}"
        )
    if facts["tied"]:
        raise EngineError(
            f"{name} has tied embeddings, of which vLLM would replace one half only: {remedy}"
        )
    if facts["on_cpu"] and facts["chunked_prefill"]:
        raise EngineError(
            f"{name} prefills in chunks, which vLLM on the CPU cannot do for seeded requests: "
            f"{remedy}"
        )


def unsent_names(
    policy: PreTrainedModel, facts: Mapping[str, Any], tied: Collection[str]
) -> set[str]:
    """Names of the policy's weights that the server's model has no place for.

    Raises:
        EngineError: some of the policy's weights would be lost or muddled in it.
    """
    has_bias: Sequence[bool] = facts["head_bias"]
    if not has_bias:  # Gemma 2 knows the input embeddings alone
        return set(tied)
    if getattr(policy.get_output_embeddings(), "bias", None) is not None and not any(has_bias):
        raise EngineError(
            f"vLLM loses the output layer's bias of {type(policy).__name__} when weights are "
            "replaced: set rollout=hf"
        )
    if facts["experts"] and facts["on_cpu"]:
        raise EngineError(
            f"vLLM on the CPU muddles the experts of {type(policy).__name__} when weights are "
            "replaced: set rollout=hf, or use a GPU"
        )
    return set()
