"""What can be wrong with a model."""


class ModelError(RuntimeError):
    """A model or tokenizer cannot be loaded or used; the message says what to change."""
