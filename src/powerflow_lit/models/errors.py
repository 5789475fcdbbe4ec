"""What can be wrong with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powerflow_lit.mendable import MendableError

if TYPE_CHECKING:
    from powerflow_lit.types import Prompt


class ModelError(MendableError, RuntimeError):
    """A model or tokenizer cannot be loaded or used; the message says what to change."""


def no_chat_template() -> ModelError:
    """`model.prompt_route=chat` with a tokenizer that has none."""
    return ModelError("this tokenizer has no chat template: set model.prompt_route=plain")


def unknown_words(prompt: Prompt) -> ModelError:
    """A tiny model on a task that it was not made for."""
    return ModelError(
        f"the model's tokenizer does not know the words of prompt {prompt.id} "
        f"({prompt.text!r}): choose the model that goes with the task "
        "(task=arithmetic: model=tiny, task=creative: model=tiny_instruct)"
    )
