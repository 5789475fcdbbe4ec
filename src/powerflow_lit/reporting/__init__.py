"""Run folders in, comparison out: reading, statistics, verdicts, figures, tables and the page.

Reads files only: neither torch nor a checkpoint is touched, so that a report starts at once.
"""
