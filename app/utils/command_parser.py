"""The parser of the commands that take no configuration of a run."""

import argparse
from typing import NoReturn

from app.utils.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """argparse with whole option names only, and errors of one line like those of the other commands.

    The lines of `description` stand in the help as they are.
    """

    def __init__(self, name: str, description: str = "") -> None:
        super().__init__(
            f"train.py {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message}; see python {self.prog} --help")
