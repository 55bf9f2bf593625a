"""What a user can cause is told in a few lines: what, where, and what to do."""


class UserError(Exception):
    """An error of the caller's making.

    The message is complete as it stands: what is wrong, where (a file and row, or a config key) and what
    to do about it. Command lines print it without a traceback and exit with code 2.
    """
