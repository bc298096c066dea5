"""Errors that the command line prints in one line, and their exit status; unknown settings: `arguments.py`."""

from collections.abc import Iterator


class InputError(ValueError):
    """Report a setting, file or model that cannot be used.

    The message says what was got, what was expected and which setting to change; the command line
    prints it without a traceback and exits with `exit_status`.
    """

    exit_status = 2


class DivergedError(InputError):
    """Report a loss or a gradient that is not finite: a result of the method and its learning rate.

    Its exit status tells `compare` that a run has diverged and did not fail.
    """

    exit_status = 3


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
