"""The one exception that is the user's to mend."""

from collections.abc import Iterator


class InputError(ValueError):
    """Report a setting, file or model that cannot be used.

    The message says what was got, what was expected and which setting to change; the command line
    prints it without a traceback and exits with status 2.
    """


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
