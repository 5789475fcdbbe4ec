"""Responses of shared prompts as one row of tokens: no padding, and each prompt once.

A refill holds many responses to each prompt, of very different lengths. Padded to a matrix, with
the prompt repeated in each row, most of a forward pass is spent on copies and padding. Packed,
the linear layers see exactly the useful tokens; attention alone knows where sequences begin
(`packed_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_lit.types import TokenBatch

# responses of a prompt that attention takes at once differ in length by this factor at most
LENGTH_RATIO = 1.5
# a response keeps a copy of its prompt's keys and values for the backward pass: what of a token's
# memory each token of it takes, 2 of about 25 hidden sizes a layer
COPY_SHARE = 1 / 12


@dataclass(frozen=True)
class Block:
    """Sequences that attention takes at once, of similar length. n of them."""

    pieces: range  # the pieces of the packed row that hold their tokens
    prompt: int | None  # the piece that all of them attend to beside their own tokens
    count: int  # n
    width: int  # L, tokens of the longest
    index: Tensor | None  # (n * L,) places in the pieces' tokens; None where all have L tokens
    real: Tensor | None  # (tokens,) places in n * L that are no padding; None as well


@dataclass(frozen=True)
class Layout:
    """How a packed row divides: a piece for each prompt, then one for each block of responses."""

    pieces: tuple[int, ...]  # tokens of each
    blocks: tuple[Block, ...]  # their tokens, in order, are the row's

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, at most; a response's prompt included."""
        before = (0 if b.prompt is None else self.pieces[b.prompt] for b in self.blocks)
        return max(block.width + prompt for block, prompt in zip(self.blocks, before, strict=True))


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass. M packed tokens, R response tokens, n rows, P prompts.

    A response's last token is predicted but predicts nothing: it is a target, and not packed.
    """

    rows: Tensor  # (n,) rows of the batch, in packed order
    input_ids: Tensor  # (1, M): the prompts, then the responses
    position_ids: Tensor  # (1, M): places in the unpacked rows
    predictors: Tensor  # (R,) place in M of the hidden state that predicts each response token
    targets: Tensor  # (R,) the response tokens, row after row
    layout: Layout
    prompt_lengths: Tensor  # (P,)
    prompt_of: Tensor  # (n,) the prompt of each row


def pack(batch: TokenBatch, rows: Sequence[int]) -> PackedBatch:
    """The chosen rows as one pass."""
    device, width = batch.input_ids.device, batch.input_ids.shape[1]
    prompts, responses = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
    groups = _groups(batch, rows, prompts)
    # sorted by length, so that those of a length are taken at once as they stand
    chosen = sorted(groups, key=len)
    members = [sorted(groups[prompt], key=lambda r: responses[r]) for prompt in chosen]
    order = [row for group in members for row in group]
    firsts = [group[0] for group in members]
    lengths = [len(prompt) for prompt in chosen]

    pieces, blocks = list(lengths), list[Block]()
    for run in _runs(lengths):
        first = sum(block.count for block in blocks)
        blocks.append(_block(run, range(first, first + len(run)), None, device))
    for number, group in enumerate(members):
        # a response of one token has none: its prompt predicts it
        for run in _runs([responses[row] - 1 for row in group if responses[row] > 1]):
            blocks.append(_block(run, range(len(pieces), len(pieces) + 1), number, device))
            pieces.append(sum(run))

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    prompt_lengths = tensor(lengths)
    first_token = tensor([row * width for row in firsts])
    own_start = tensor([row * width + prompts[row] for row in order])
    own_length = tensor([responses[row] for row in order])
    source = torch.cat([_spans(first_token, prompt_lengths), _spans(own_start, own_length - 1)])
    flat = batch.input_ids.flatten()
    # a response token is predicted by the one before it, the first by the end of the prompt
    prompt_of = tensor([k for k, group in enumerate(members) for _ in group])
    packed_start = sum(lengths) + (own_length - 1).cumsum(0) - (own_length - 1)
    predictors = _spans(packed_start - 1, own_length)
    predictors[own_length.cumsum(0) - own_length] = prompt_lengths.cumsum(0)[prompt_of] - 1
    return PackedBatch(
        rows=tensor(order),
        input_ids=flat[source][None],
        position_ids=(source % width)[None],
        predictors=predictors,
        targets=flat[_spans(own_start, own_length)],
        layout=Layout(tuple(pieces), tuple(blocks)),
        prompt_lengths=prompt_lengths,
        prompt_of=prompt_of,
    )


def packed_microbatches(batch: TokenBatch, tokens_per_microbatch: int) -> list[list[int]]:
    """Rows of each pass: no more packed tokens than the budget, prompts not torn where possible.

    The copies of a prompt's keys and values that its responses keep count too (`COPY_SHARE`). A
    prompt whose responses do not fit is computed once in each pass that it takes part in. A single
    response longer than the budget stands alone with its prompt.
    """
    prompts, responses = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
    parts: list[list[int]] = [[]]
    used = 0
    for prompt, group in _groups(batch, range(len(prompts)), prompts).items():
        copy = int(COPY_SHARE * len(prompt))
        whole = len(prompt) + sum(responses[row] - 1 + copy for row in group)
        if parts[-1] and used + whole > tokens_per_microbatch:
            parts.append([])
            used = 0
        used += len(prompt)
        for row in group:
            tokens = responses[row] - 1 + copy
            if parts[-1] and used + tokens > tokens_per_microbatch:
                parts.append([])
                used = len(prompt)
            parts[-1].append(row)
            used += tokens
    return parts


def _groups(
    batch: TokenBatch, rows: Sequence[int], lengths: Sequence[int]
) -> dict[tuple[int, ...], list[int]]:
    """The chosen rows by the tokens of their prompt; `lengths` are the prompts' of all rows."""
    width = max(lengths[row] for row in rows)
    ids = batch.input_ids[list(rows), :width].tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in zip(rows, ids, strict=True):
        groups.setdefault(tuple(prompt[: lengths[row]]), []).append(row)
    return groups


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each span, one after the other."""
    before = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    inside = torch.arange(len(before), device=lengths.device) - before
    return starts.repeat_interleave(lengths) + inside


def _runs(lengths: Sequence[int]) -> list[list[int]]:
    """Ascending lengths, cut where the shortest would be padded too much."""
    runs: list[list[int]] = []
    for length in lengths:
        if not runs or length > LENGTH_RATIO * runs[-1][0]:
            runs.append([])
        runs[-1].append(length)
    return runs


def _block(run: list[int], pieces: range, prompt: int | None, device: torch.device) -> Block:
    count, width = len(run), run[-1]
    if run[0] == width:
        return Block(pieces, prompt, count, width, None, None)
    lengths = torch.tensor(run, device=device)
    column = torch.arange(width, device=device)
    inside = column < lengths[:, None]  # (n, L)
    first = lengths.cumsum(0) - lengths
    index = torch.where(inside, first[:, None] + column, 0).flatten()
    return Block(pieces, prompt, count, width, index, inside.flatten().nonzero()[:, 0])
