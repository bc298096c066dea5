"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Report a setting, file or model that cannot be used.

    The message says what was got, what was expected and which setting to change; the command line
    prints it without a traceback and exits with status 2.
    """
