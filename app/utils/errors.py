"""Errors that the command line prints in one line, and their exit status; unknown settings: `arguments.py`."""

import traceback
from collections.abc import Iterator
from pathlib import Path


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


def reason(error: Exception) -> str:
    """Say in one line what went wrong: an OSError's own words, else the exception and where it was raised."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    message = " ".join(str(error).split()) or "no message"
    if isinstance(error, InputError):
        return message
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"
