"""Errors that end a command with one clear line instead of a traceback."""


class LongstrideError(Exception):
    """A mistake in the input, or a state of the world the user can mend.

    The message is one line: what is wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with status 2.
    """


class ConfigError(LongstrideError):
    """The configuration is invalid; the message names the key."""


class DataError(LongstrideError):
    """A file is missing, truncated, corrupted, or belongs to something else."""


class NumericsError(LongstrideError):
    """A simulation or training run left the finite numbers (NaN, infinity, blow-up)."""
