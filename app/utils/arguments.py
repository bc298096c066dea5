"""The parser of settings: every unknown or wrong one is an error of one line with the nearest known name."""

import argparse
import json
import pkgutil
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning_utilities.core.enums import StrEnum
from omegaconf.errors import OmegaConfBaseException

from app.utils.class_paths import bare_name, exists, failed_import
from app.utils.errors import InputError, causes
from app.utils.text import did_you_mean, nearest

# Defaults of Lightning's classes, such as Timer's interval, are texts that YAML's dumper does not know.
yaml.SafeDumper.add_multi_representer(
    StrEnum, lambda dumper, text: dumper.represent_str(text.value)
)


class PlainHelp(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The parser's usual help, with the lines of a description as they are."""


class WrongSetting(InputError):
    """An unknown setting, or a wrong value of one.

    Args:
        key: The setting, as the parser at hand knows it; those around it add what stands before.
        problem: What stands behind the key; None if there is no such setting.
        close: The setting of the parser at hand that is most like an unknown one.
    """

    def __init__(self, key: str, problem: str | None = None, close: str | None = None) -> None:
        if problem is not None:
            message = f"{key}{problem}"
        else:
            hint = "see --help" if close is None else f"did you mean {close}?"
            message = f"there is no setting {key}; {hint}"
        super().__init__(message)
        self.key, self.problem, self.close = key, problem, close

    def below(self, section: str) -> "WrongSetting":
        """Return the same error as the parser around sees it."""
        close = None if self.close is None else f"{section}.{self.close}"
        return WrongSetting(f"{section}.{self.key}", self.problem, close)


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are one plain line with the nearest known name."""

    # Classes whose subclasses a `class_path` may name; the command line adds its own.
    bases: ClassVar[list[type]] = [Callback, torch.optim.Optimizer]
    # What to say of settings that a reader may know from elsewhere; the command line adds them.
    unsupported: ClassVar[dict[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # else a misspelt --output.nam would mean --output.name
        self._defaults_made: tuple[list[tuple[argparse.Action, Any]], Namespace] | None = None

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise InputError instead of printing the usage."""
        text = " ".join(str(message).split())
        at = re.match(r'Parser key "([^"]+)": ', text)
        inner = next((e for e in causes(ex) if isinstance(e, WrongSetting)), None)
        if at and (failure := failed_import(ex)):
            raise WrongSetting(at[1], f" names a class that cannot be imported: {failure}") from ex
        if at and inner:
            raise self._named(inner.below(at[1])) from ex
        if at:
            raise _wrong_value(at[1], text[at.end() :]) from ex
        unknown = re.search(
            r"(?:Option|does not accept option) '([^']+)'|unrecognized arguments: --([\w.]+)", text
        )
        if unknown:
            raise self._unknown(unknown[1] or unknown[2], text) from ex
        extra = re.match("unrecognized arguments: (.*)", text)
        if extra:
            raise InputError(f"{extra[1]!r} belongs to no setting: expected --NAME VALUE") from ex
        required = re.match("the following arguments are required: (.*)", text)
        if required:
            raise InputError(
                f"no value is given for {required[1]}: name a file with --config, such as quickstart.yaml"
            ) from ex
        raise InputError(text) from ex

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Parse; a JSON list or mapping given for a text is an error, not its text."""
        given = list(args or ())
        try:
            settings = super().parse_args(args, *more, **kwargs)
        except WrongSetting as error:
            if not (error.problem or error.close) and _stands_before_a_file(error.key, given):
                raise InputError(
                    f"there is no setting {error.key} yet where it stands: put it behind --config"
                ) from error
            raise
        for option, following in zip(given, [*given[1:], ""], strict=True):
            name, equals, value = option.removeprefix("--").partition("=")
            value = value if equals else following
            if name and _is_json_collection(value) and isinstance(settings.get(name), str):
                raise WrongSetting(name, f" is {value}: expected text")
        return settings

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """Return the defaults; the parser asks for them many times and each time makes those of all classes."""
        given = [(action, action.default) for action in self._actions]
        if self._defaults_made is None or self._defaults_made[0] != given:
            self._defaults_made = given, super().get_defaults(*args, **kwargs)
        return self._defaults_made[1].clone()

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Make the objects; say in one line why one cannot be made, such as a package that is missing."""
        try:
            return super().instantiate(*args, **kwargs)
        except ValueError as error:
            if any(isinstance(cause, InputError) for cause in causes(error)):
                raise
            raise InputError(_cannot_be_made(error)) from error

    def _named(self, error: WrongSetting) -> WrongSetting:
        """Return the error, or a better one of a setting that is known not to be supported."""
        for name, message in self.unsupported.items():
            if f"{error.key}.".startswith(f"{name}."):
                return WrongSetting(error.key, f": {message}")
        return error

    def _unknown(self, wrong: str, text: str) -> WrongSetting:
        group = re.match(r"Group '([^']+)'", text)
        # `data.batch_size` is short for `data.init_args.batch_size`
        full = (f"{group[1]}." if group else "") + wrong.removeprefix("init_args.")
        known = [action.dest for action in self._actions if action.dest != "help"]
        return WrongSetting(full, close=nearest(full, known))


def _stands_before_a_file(key: str, arguments: Sequence[str]) -> bool:
    """Return whether an option precedes a `--config`, which may name the class that has the setting."""
    names = [argument.partition("=")[0].removeprefix("--") for argument in arguments]
    return key in names and "config" in names[names.index(key) :]


def _is_json_collection(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def wrong_reference(error: OmegaConfBaseException) -> InputError:
    """Say in plain words which `${...}` cannot be resolved among the settings."""
    key = str(error.full_key)
    message = str(error).partition("\n")[0]
    reason = f"is wrong: {message}"
    relative = re.search(r"resolved to '(.+?)'", message)
    name = relative or re.search(r"Interpolation key '(.+?)'", message)
    if name and "not found" in message:
        reason = f"refers to {name[1]}, which is no setting"
    return InputError(f"{key} {reason}")


def _wrong_value(key: str, text: str) -> WrongSetting:
    """Say in plain words what the parser says of a value."""
    known = _known_classes()
    moved = re.search(r"(?<![\w.])(?:app|callbacks|data_modules)\.[\w.]+", text)
    if moved and not exists(moved[0]) and bare_name(moved[0]) in known:
        now = bare_name(moved[0])
        return WrongSetting(key, f" is {moved[0]}, which is no class any more: write {now}")
    simple = re.match(r"Expected an? (.+?)\. Got value: (.*)", text)
    if simple:
        kinds, got = simple[1], simple[2]
        choices = _quoted(kinds) if "Literal" in kinds else []
        wanted = f"one of {', '.join(choices)}" if choices else _kinds(kinds)
        return WrongSetting(key, f" is {got}: expected {wanted}{did_you_mean(got, choices)}")
    # A value below an optional section, given on the command line.
    nested = re.search(r'- Parser key "([^"]+)": (Expected .*?)(?: - Expected|$)', text)
    if nested:
        return _wrong_value(f"{key}.{nested[1]}", nested[2])
    name = re.search(
        r"given class_path '([^']+)'|dot import path string: ([A-Za-z]\S+)|class_path='([^']+)'",
        text,
    )
    if name:
        wrong = next(group for group in name.groups() if group)
        hint = did_you_mean(wrong.rpartition(".")[2], known, cutoff=0.6)
        missing = re.search(r"No module named '([^']+)'", text)
        if missing and f"{wrong}.".startswith(f"{missing[1]}."):
            hint += f" (the current folder and PYTHONPATH have no module {missing[1]})"
        return WrongSetting(key, f" is {wrong!r}, which is no class{hint}")
    union = re.match(r".*Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", text)
    if union:
        return WrongSetting(key, f" is {union[2]}: expected {_kinds(union[1])}")
    return WrongSetting(key, f": {text}")


def _cannot_be_made(error: ValueError) -> str:
    """Say why the parser could not make an object of a class; its error names the class among much else."""
    told = r"Problem with given class_path '([^']+)':\s*(.+?)(?=\n\s*- |\nGiven value|\Z)"
    named = re.search(told, str(error), re.DOTALL)  # an import, or what a class says of its import
    if named is not None:
        reason = " ".join(named[2].split())
        return f"{named[1]} cannot be made, which may need another package: {reason}"
    named = re.search(r"class_path='([^']+)'", str(error))
    reason = " ".join(str(list(causes(error))[-1]).split())
    return f"{named[1] if named else 'a class'} cannot be made: {reason}"


def _kinds(text: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    words |= {"str": "text", "NoneType": "null"}
    names = [name for literal in re.findall(r"Literal\[(.*?)\]", text) for name in _quoted(literal)]
    names += re.findall(r"\b(?:dict|list|tuple)\[[^\[\]]+\]", text)
    names += [name.rpartition(".")[2] for name in re.findall(r"<class '([^']+)'>", text)]
    return " or ".join(words.get(name, name) for name in names) or text


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']+)'", text)


def class_named(path: str) -> type:
    """Return the class that a `class_path` names: a known one by its bare name, any other by its full path.

    Raises:
        ImportError, AttributeError, ValueError: There is none.
    """
    return _known_classes().get(path) or pkgutil.resolve_name(path)


def _known_classes() -> dict[str, type]:
    """Return the classes that a `class_path` may name, by their bare names."""
    known = list(Parser.bases)
    for kind in known:
        known += kind.__subclasses__()
    return {kind.__name__: kind for kind in known}


def listed(value: Any) -> list[Any]:
    """Return one or several objects of the trainer as a list; switches (null, true, false) count as none."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]
