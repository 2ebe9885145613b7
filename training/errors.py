"""What a user can mend."""


class UsageError(Exception):
    """One line for the user: what was wrong and what would be right. Entry points print it and exit with status 2."""


class BusyError(UsageError):
    """Another process is at this run."""
