"""The exceptions that the command line turns into a message and exit status 2."""

from __future__ import annotations


class UserError(Exception):
    """Input, configuration or environment that the user can mend; its text says how, without a traceback."""


class SharedError(UserError):
    """One that every process of a run raises: the first one says it."""
