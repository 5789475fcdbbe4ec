"""The root of all errors that a person can mend; imports nothing, so that every room may."""


class MendableError(Exception):
    """Its message is one line that names the value, the file or the place, and the remedy.

    Entry points print it as `error: ...` and exit with 2, without a traceback.
    """
