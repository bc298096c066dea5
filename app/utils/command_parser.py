"""The parser of the commands that take no configuration of a run, and of options beside one."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from app.utils.errors import InputError
from app.utils.text import did_you_mean


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


def parse_list(option: str, text: str, kind: Any, expected: str) -> list[Any]:
    """Read an option's values of a type that pydantic checks, with commas between.

    Raises:
        InputError: A value is not what is expected, or occurs twice.
    """
    values: list[Any] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            value = TypeAdapter(kind).validate_python(part)
        except ValidationError as error:
            raise InputError(f"{option} has {part!r}: expected {expected}") from error
        if value in values:
            raise InputError(f"{option} names {value} twice: expected each value once")
        values.append(value)
    return values


def check_not_misspelt(rest: Sequence[str], given: argparse.Namespace) -> None:
    """Raise InputError if an argument that is left over looks like an option of the command itself.

    Args:
        rest: Arguments that go on to `fit`, whose options have sections, such as --data.path.
        given: The command's own options.
    """
    own = [f"--{name}" for name in vars(given)]
    for name in (argument.partition("=")[0] for argument in rest):
        hint = did_you_mean(name, own, cutoff=0.8)
        if name.startswith("--") and "." not in name and hint:
            raise InputError(f"there is no option {name}{hint}")
