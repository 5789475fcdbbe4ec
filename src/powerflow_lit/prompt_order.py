"""Which prompts a run uses and in which order; no rollouts yet."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.types import Prompt

TokenIds = tuple[int, ...]


def usable_prompts(
    role: str,
    prompts: Sequence[Prompt],
    encode: Callable[[Sequence[Prompt]], list[TokenIds]],
    *,
    task: str,
    limit: int,
    needed: int,
) -> tuple[list[Prompt], dict[int, TokenIds]]:
    """Prompts within the token limit, and all prompts' token ids by the prompt's own id.

    Args:
        role: what the prompts are for, in messages.
        encode: from prompts to token ids.
        limit: tokens of a prompt.
        needed: prompts that are used at once.

    Raises:
        TaskError: fewer are short enough.
    """
    ids = dict(zip([p.id for p in prompts], encode(prompts), strict=True))
    usable = [p for p in prompts if len(ids[p.id]) <= limit]
    if len(usable) < needed:
        raise TaskError(
            f"task {task} has {len(usable)} of {len(prompts)} {role} prompts within "
            f"{limit} tokens, but {needed} are needed at once: lower "
            "rollout.prompts_per_refill or raise rollout.max_prompt_tokens"
        )
    if len(usable) < len(prompts):
        dropped = len(prompts) - len(usable)
        print(f"{dropped} of {len(prompts)} {role} prompts are over {limit} tokens: dropped")
    return usable, ids


def prompts_of(refill: int, prompts: Sequence[Prompt], *, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts of a refill: shuffled passes over the set, a function of (seed, refill).

    One shuffle a lap is made: real sets have 10^5 prompts and more.
    """
    chosen: list[Prompt] = []
    orders: dict[int, list[int]] = {}
    for position in range(refill * count, (refill + 1) * count):
        lap, place = divmod(position, len(prompts))
        if lap not in orders:
            orders[lap] = random.Random(f"{seed}-lap-{lap}").sample(
                range(len(prompts)), len(prompts)
            )
        chosen.append(prompts[orders[lap][place]])
    return chosen
