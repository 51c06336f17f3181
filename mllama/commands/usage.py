"""What is wrong with the options of a command as such."""

from __future__ import annotations


class UsageError(ValueError):
    """Options that contradict each other: the exit code is 2, as for those that do not exist."""
