"""How a run ends that no further update can save."""


class DivergedError(RuntimeError):
    """The run has diverged; one line that says by what numbers, and what to try.

    It ends with status `diverged`: without an export, and with the checkpoint that was good last.
    """
