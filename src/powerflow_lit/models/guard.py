"""The mathematics of the min-p guard: which tokens are allowed, and log-probs over those alone.

A place allows M_t = {v : pi_old(v) >= min_p * max_v pi_old(v)} of the policy as it was when it
sampled, and the sampled token. Policy, behaviour and base are renormalised over the same M_t, so
that the target is the alpha-power of the base restricted to M_t: what the base holds outside is
never revived, however small alpha is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from powerflow_lit.types import AllowedTokens


def allowed_tokens(logits: Tensor, sampled: Tensor, min_p: float) -> AllowedTokens:
    """M_t of each place, from the sampling policy. logits (M, V), sampled (M,) ids, min_p > 0."""
    inside = logits >= logits.amax(1, keepdim=True) + math.log(min_p)
    # the engine rounds otherwise: a token at the border may be outside for us
    inside.scatter_(1, sampled[:, None], True)
    return AllowedTokens(inside.nonzero()[:, 1].int(), inside.sum(1).int())


def log_prob_over(logits: Tensor, targets: Tensor, allowed: AllowedTokens) -> Tensor:
    """log-softmax over each place's allowed tokens, at its target, which is among them.

    logits (M, V) float32, targets (M,) ids -> (M,) nats; no gradient reaches other logits.
    """
    ids = allowed.padded()  # (M, K)
    chosen = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    place = (ids == targets[:, None]).int().argmax(1)
    return -nn.functional.cross_entropy(chosen, place, reduction="none")


def removed_mass(full: Tensor, restricted: Tensor) -> Tensor:
    """Probability outside the allowed tokens, in [0, 1].

    From a token's log-prob over the full vocabulary and over the allowed tokens (nats, any shape):
    their difference is the log of the allowed tokens' mass.
    """
    return -torch.expm1((full - restricted).clamp(max=0))
