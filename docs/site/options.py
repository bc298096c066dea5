"""Tables of every option, made from the signatures and docstrings that the command line reads."""

import argparse
import inspect
import io
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from app.cli.lora_cli import LoraCLI
from app.cli.main import COMMANDS, main
from app.evaluation.benchmark import Benchmark
from app.models.adapter_config import AdaLoraBudget, LoraSettings
from app.utils.signals import StopSignals
from callbacks.initialization import AdapterInit
from data_modules.text import TextDataModule

ROOT = Path(__file__).parents[2]
FIT_LIKE = ("fit", "plan", "validate", "test")
HEADS = {
    "trainer": (
        "Trainer options",
        "`trainer.*` is Lightning's own, with the project's defaults. What works beside an adapter and what is "
        "refused: [Lightning's features](../trainer.md).",
    ),
    "model": ("Model options", "What is trained. Which models: [models](../models.md)."),
    "data": (
        "Data options",
        "`data.class_path` names one of these classes, `data.init_args` has its options. What they read: "
        "[data](../data.md).",
    ),
    "benchmarks": (
        "Benchmark options",
        "Members of the list `data.evals`. How they ask and score: [benchmarks](../evaluation.md).",
    ),
    "init": (
        "Initialization options",
        "`init.class_path` names one of these classes; `init: null` keeps PEFT's initialization. What they "
        "compute: [initialization](../initialization.md).",
    ),
    "optimizers": (
        "Optimizer options",
        "`model.optimizer.class_path` names one of these classes, or any optimizer of torch by its full path. "
        "Which method takes which: [methods](../methods.md).",
    ),
    "callbacks": (
        "Callback and strategy options",
        "For the list `trainer.callbacks`, and for `trainer.strategy`. Lightning's own: "
        "[Lightning's features](../trainer.md).",
    ),
    "output": (
        "Output and other options",
        "Where a run writes ([runs](../runs.md)), and the options that stand in no section.",
    ),
}
OWN = ("app.", "callbacks.", "data_modules.")


class ParserMadeError(Exception):
    """Carries the parser of a command, before it parses."""


class ParserOnly(LoraCLI):
    """The command line up to its parser."""

    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        """Hand the parser out instead of parsing."""
        raise ParserMadeError(parser)


def command_parser(command: str) -> ArgumentParser:
    """Return the parser of `fit`, `plan`, `validate` or `test`."""
    try:
        with StopSignals() as signals:
            ParserOnly(command, [], signals)
    except ParserMadeError as made:
        return made.args[0]
    raise AssertionError("LightningCLI has not parsed")


def type_name(kind: Any) -> str:
    """Write a type as one reads it in YAML: `int | null`, `cut | refuse`, `list[str]`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Callable:
        return type_name(arguments[-1])
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, arguments))}]"
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))


def cell(text: str) -> str:
    """Return a text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def default_of(action: argparse.Action) -> str:
    """Write an option's default as YAML does."""
    value = action.default
    if action.required:
        return "required"
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"].rpartition(".")[2]
    elif isinstance(value, dict) and len(value) > 1:
        return "see below"
    plain = {None: "null", True: "true", False: "false"}
    text = plain[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def table(actions: Iterable[argparse.Action]) -> str:
    """Write a table of options: name, type, default, meaning."""
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for action in actions:
        annotation = getattr(action, "_typehint", None)
        if annotation is None or action.default == argparse.SUPPRESS:
            continue  # an option that prints help or reads a file
        kind, default = type_name(annotation), default_of(action)
        help_text = re.sub(r"`([^`<]+?)\s*<(\S+?)>`_+", r"[\1](\2)", action.help or "")
        help_text = re.sub(r":\w+:`~?([^`<]+?)`", r"`\1`", help_text).replace("``", "`")
        rows.append(f"| `{action.dest}` | {cell(kind)} | {cell(default)} | {cell(help_text)} |")
    if len(rows) == 2:
        return "No options."
    return "\n".join(['<div class="options" markdown>', "", *rows, "", "</div>"])


def about(kind: type) -> tuple[str, str]:
    """Return the first line of a class's docstring, and what stands before its sections."""
    text = inspect.getdoc(kind) or ""
    head, _, rest = text.partition("\n")
    body = re.split(
        r"^(?:Args|Attributes|Source|Returns|Raises|Differs|Example)s?:", rest, flags=re.MULTILINE
    )[0]
    return head, body.strip("\n")


def of_class(kind: type, place: str = "") -> str:
    """Document the options of a class.

    Args:
        kind: The class.
        place: The setting that it is the value of; without one `class_path` names it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip={"params"} if issubclass(kind, Optimizer) else set())
    head, body = about(kind)
    where = f"`{place}`" if place else f"`class_path: {kind.__name__}`"
    file = f"{kind.__module__.replace('.', '/')}.py"
    parts = [f"## {kind.__name__}", head, body, f"{where}, in `{file}`.", table(parser._actions)]
    return "\n\n".join(part for part in parts if part)


def subclasses(base: type, only_named: bool = False) -> list[type]:
    """List the project's classes below a class which a configuration may name.

    Args:
        base: The class above them.
        only_named: Take those alone that a file of configs/ names; every command makes the others itself.
    """
    named = "".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    below, found = base.__subclasses__(), set()
    while below:
        kind = below.pop()
        below += kind.__subclasses__()
        leaf = not kind.__subclasses__() and not only_named
        if kind.__module__.startswith(OWN) and (leaf or f"class_path: {kind.__name__}\n" in named):
            found.add(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def page(title: str, text: str, *parts: str) -> str:
    """Put a page together."""
    return "\n\n".join([f"# {title}", text, *parts]) + "\n"


def commands_page() -> str:
    """Return the page of the other commands: what `--help` of each prints."""
    parts = []
    for name in COMMANDS:
        if name in FIT_LIKE:
            continue
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            main([name, "--help"])
        text = printed.getvalue().replace(" \b", "").rstrip()  # of jsonargparse
        parts.append(f"## {name}\n\n```text\n{text}\n```")
    text = (
        "What `python train.py COMMAND --help` prints. `fit`, `plan`, `validate` and `test` take the options "
        "of [a run](trainer.md); `init`, `one_step` and `compare` take them beside their own. What each "
        "command does: [runs](../runs.md)."
    )
    return page("Options of the commands", text, *parts)


def option_pages() -> dict[str, str]:
    """Return the pages of options by their path in the site."""
    actions = command_parser("fit")._actions

    def section(name: str) -> str:
        return table(action for action in actions if action.dest.startswith(f"{name}."))

    no_section = table(action for action in actions if "." not in action.dest)
    parts: dict[str, list[str]] = {
        "trainer": [section("trainer")],
        "model": [
            section("model"),
            of_class(LoraSettings, "model.adapter"),
            of_class(AdaLoraBudget, "model.adapter.adalora"),
        ],
        "data": [of_class(kind) for kind in subclasses(TextDataModule)],
        "benchmarks": [of_class(kind) for kind in subclasses(Benchmark)],
        "init": [of_class(kind) for kind in subclasses(AdapterInit)],
        "optimizers": [of_class(kind) for kind in subclasses(Optimizer)],
        "callbacks": [
            of_class(kind)
            for kind in [*subclasses(Callback, only_named=True), *subclasses(Strategy)]
            if not issubclass(kind, AdapterInit)
        ],
        "output": [section("output"), no_section],
    }
    pages = {name: page(*HEADS[name], *parts[name]) for name in parts}
    return {
        f"reference/{name}.md": text
        for name, text in {**pages, "commands": commands_page()}.items()
    }
