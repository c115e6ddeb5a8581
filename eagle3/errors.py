"""The two errors a user sees as one sentence, without a traceback."""


class ConfigError(ValueError):
    """The configuration cannot work; `run.py` exits with 2 before anything is loaded."""

    exit_code = 2


class RunError(RuntimeError):
    """The run met something it cannot go on with (data, files, a model); `run.py` exits with 1."""

    exit_code = 1


class DamageError(RunError):
    """A file is missing, cut, or not as it was written."""


def first_line(error: Exception) -> str:
    """What a library says first: some begin with an empty line, some say nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
