"""How alpha is used over training by its progress in [0, 1] (`alpha_schedule=`): pure functions.

Those that aim at a target are in `automatic_alpha`.
"""

from __future__ import annotations


def constant(alpha: float, progress: float) -> float:
    """alpha throughout."""
    return alpha


def anneal(alpha: float, progress: float, *, start: float, share: float) -> float:
    """From `start` to alpha in a straight line over the first `share` of training, then alpha."""
    return alpha if progress >= share else start + (alpha - start) * progress / share
