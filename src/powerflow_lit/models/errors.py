"""What can be wrong with a model."""

from powerflow_lit.mendable import MendableError


class ModelError(MendableError, RuntimeError):
    """A model or tokenizer cannot be loaded or used; the message says what to change."""
