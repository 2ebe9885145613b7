"""Errors that the user can fix."""


class UsageError(Exception):
    """One line for the user: what is wrong, the value, and what would be right. Scripts exit with status 2."""


class BusyError(UsageError):
    """Another process is working on this run."""
