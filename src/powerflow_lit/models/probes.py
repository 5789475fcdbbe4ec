"""Before a run starts: does a model work the way that its log-probs are computed here?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.logprobs import OutputLayer, response_scores
from powerflow_lit.models.packed_attention import PackingError, teach_packing
from powerflow_lit.types import TokenBatch


@torch.no_grad()
def check_output_layer(model: Any) -> None:
    """Compare log-probs as computed here with those of the model's own logits, on a few tokens.

    Raises:
        ModelError: they differ; the architecture does more to its logits than `OutputLayer` knows.
    """
    size = len(OutputLayer.of(model).weight)
    ids = [k * size // 8 for k in range(8)]  # one alone may be the padding, whose embedding is 0
    batch = TokenBatch.collate([(ids[:1], ids[1:])], 0).to(model.device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, batch.input_ids[0, 1:, None])[:, 0]
    own = response_scores(model, batch, tokens_per_microbatch=8, logit_chunk_mb=1.0).log_prob[0]
    gap = float((own - expected).abs().max())
    rounding = _rounding(model.dtype, 1e-3)
    if not gap <= rounding * max(1.0, float(logits.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: log-probs computed from its hidden states are {gap:.3g} nats "
            "off its own; its logits are made in a way that is not supported (known are a bias, "
            "logit_scale, logits_scaling and final_logit_softcapping)"
        )


@torch.no_grad()
def allow_packing(model: Any) -> None:
    """Let log-probs of this model be computed over packed rows from now on.

    Those of a few responses are compared with the padded way first.

    Raises:
        PackingError: the model has to stay with padded rows; says why.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention", "sliding_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise PackingError(f"it has layers of the kind {min(other)}")
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    batch = _few_responses(len(OutputLayer.of(model).weight)).to(model.device)
    padded = _scores_of(model, batch)
    teach_packing(model)
    model.packed_span = float("inf") if window is None else window
    try:
        gap = float((_scores_of(model, batch) - padded).abs().max())
        if not gap <= _rounding(model.dtype, 1e-4) * max(1.0, float(padded.abs().max())):
            raise PackingError(f"log-probs of packed rows are {gap:.3g} nats off")
    except (ModelError, TypeError, ValueError, RuntimeError, IndexError) as error:
        del model.packed_span
        raise PackingError(str(error).splitlines()[0]) from error


def _scores_of(model: Any, batch: TokenBatch) -> Tensor:
    return response_scores(model, batch, tokens_per_microbatch=1000, logit_chunk_mb=1.0).log_prob


def _few_responses(vocabulary: int) -> TokenBatch:
    """Two prompts with three responses and one with one, all of other lengths."""
    ids = [(7 * k + 3) % vocabulary for k in range(40)]
    prompts = [ids[:5], ids[5:8], ids[8:15]]
    rows = [(prompts[0], ids[20:24]), (prompts[1], ids[24:25]), (prompts[0], ids[25:34])]
    rows += [(prompts[2], ids[3:9]), (prompts[1], ids[30:37]), (prompts[0], ids[10:14])]
    return TokenBatch.collate([*rows, (prompts[1], ids[11:14])], 0)


def _rounding(dtype: torch.dtype, least: float) -> float:
    return max(least, 4 * torch.finfo(dtype).eps)
