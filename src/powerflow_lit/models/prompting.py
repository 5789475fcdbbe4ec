"""From a prompt to token ids (bare text for a base, its template for a chat model) and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich import get_console
from rich.progress import track
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.errors import no_chat_template, unknown_words
from powerflow_lit.types import Prompt

Route = Literal["auto", "plain", "chat"]
ENCODED_AT_ONCE = 1024
MANY_PROMPTS = 5000  # from here on it takes long enough for a progress bar
# Llama's template writes today's date where it is given none: a run would depend on its day
TEMPLATE_DATE = "26 Jul 2024"  # the date that Llama's template falls back to


def taken_route(tokenizer: Tokenizer, route: Route) -> Literal["plain", "chat"]:
    """`auto` is the chat template where the tokenizer has one, for bases too (as EMPO does).

    Raises:
        ModelError: `chat` without a chat template.
    """
    if route == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if route == "chat" and not tokenizer.chat_template:
        raise no_chat_template()
    return route


def route_line(tokenizer: Tokenizer, route: Route) -> str:
    """The route in words, for the console."""
    taken = taken_route(tokenizer, route)
    how = "the tokenizer's chat template" if taken == "chat" else "plain text and a line break"
    without = ", for want of a chat template" if (route, taken) == ("auto", "plain") else ""
    return f"prompts as {how}{without} (model.prompt_route={route})"


def render(tokenizer: Tokenizer, text: str, route: Route) -> str:
    """What the model reads: the text and a line break, or one user turn of its chat template.

    Raises:
        ModelError: `chat` without a chat template.
    """
    if taken_route(tokenizer, route) == "plain":
        return text + "\n"
    turn = [{"role": "user", "content": text}]
    return str(
        tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
        )
    )


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], route: Route
) -> dict[int, tuple[int, ...]]:
    """Token ids by prompt id.

    Raises:
        ModelError: the tokenizer does not know the words of a prompt (a tiny model on a task that
            it was not made for).
    """
    encoded = {}
    # a chat template writes its own special tokens; bare text gets the tokenizer's usual ones
    special = taken_route(tokenizer, route) == "plain"
    # a fast tokenizer takes many texts at once, on all cores
    starts = range(0, len(prompts), ENCODED_AT_ONCE)
    unseen = len(prompts) < MANY_PROMPTS or not get_console().is_terminal
    for start in track(starts, "encoding prompts", transient=True, disable=unseen):
        some = prompts[start : start + ENCODED_AT_ONCE]
        texts = [render(tokenizer, prompt.text, route) for prompt in some]
        rows = tokenizer(texts, add_special_tokens=special)["input_ids"]
        for prompt, ids in zip(some, rows, strict=True):
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise unknown_words(prompt)
            encoded[prompt.id] = tuple(ids)
    return encoded


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of a response, without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
