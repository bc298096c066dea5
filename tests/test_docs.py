"""README and docs/ name files, functions, links and commands that exist."""

import ast
import importlib
import re
import shlex

import pytest

from app.cli.lora_cli import LoraCLI
from app.utils.command_parser import CommandParser
from tests.support import support_page
from tests.support.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# What CONTRIBUTING.md's example makes.
EXAMPLE = {"callbacks/orthogonal_init.py", "tests/callbacks/test_orthogonal_init.py"}
EXAMPLE |= {"configs/methods/orthogonal.yaml"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_tree_of_the_readme_is_that_of_the_project():
    block = (ROOT / "README.md").read_text().partition("## The tree\n\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    ( *)(\S+) +(.*)$", block, re.MULTILINE)
    assert len(entries) == len(block.splitlines())
    named = {f"app/{name}" if indent else name: text for indent, name, text in entries}
    made = {"runs", "wandb", "data", "build", "dist"}  # by using or installing the project
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not re.match(r"[._]", p.name)]
    folders = [p for p in folders if p.name not in made and p.suffix != ".egg-info"]
    rooms = [path.parent for path in (ROOT / "app").glob("*/__init__.py")]
    wanted = {f"{path.relative_to(ROOT)}/" for path in [*folders, *rooms]}
    assert set(named) == {"train.py", *wanted}
    for folder, text in named.items():
        for name in re.findall(r"(\w+)/", text):
            assert (ROOT / folder / name).is_dir(), f"{folder}{name}"


@each_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@each_page
def test_files_exist(page):
    folders = "|".join(
        ("app", "callbacks", "data_modules", "configs", "benchmarks", "launch", "tests")
    )
    pattern = rf"`((?:{folders})/[\w/]*[\w.]*)`"
    for name in set(re.findall(pattern, page.read_text())) - EXAMPLE:
        # An overlay is named as --config takes it.
        assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name


def defined(file):
    """Return the names of functions, methods, classes and constants in a file."""
    tree = ast.parse(file.read_text())
    kinds = ast.FunctionDef | ast.ClassDef
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return {n.name for n in ast.walk(tree) if isinstance(n, kinds)} | assigned


@each_page
def test_functions_stand_in_the_files_named_before_them(page):
    """A reference is `file.py`: `name` and further names to the end of the item or sentence."""
    text = page.read_text()
    references = re.findall(
        r"`([\w/]+\.py)`:\s+(`\w+`.*?)(?=`[\w/]+\.py`|\n\d|\n\n|\Z)", text, re.DOTALL
    )
    assert references or page.name not in ("README.md", "architecture.md")
    for file, rest in references:
        first = re.match(r"`(\w+)`", rest)[1]
        assert first in defined(ROOT / file), f"{first} in {file}"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_numbered_walks(page):
    """Every name in backquotes of a walk's item is defined in the file of its step."""
    text = (ROOT / page).read_text()
    items = re.findall(
        r"^\d+\. `([\w/]+\.py)`:\s+(.*?)(?=^\d+\. |\n\n|\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert len(items) >= 6
    for file, rest in items:
        own = re.sub(r"\(by `.*?`:\s+`\w+`\)", "", rest)
        for name in re.findall(r"`(\w+)`", own):
            assert name in defined(ROOT / file), f"{name} in {file}"


def test_the_page_of_what_works_has_every_cell_and_counts_them():
    page = support_page.PAGE.read_text()
    outcomes = support_page.read(page)
    assert list(outcomes) == support_page.keys()
    assert support_page.write(outcomes) == page


BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_modules(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@each_page
def test_benchmarks_exist(page):
    for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text()):
        assert name in ("NAME", *BENCHMARKS)
    assert "python benchmarks/" not in page.read_text()


def commands(page):
    """Return the arguments of every `python train.py COMMAND ...` of a page that can be parsed as it stands."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    fence, block = r"^```\w*\n(.*?)^```", r"^ {4,}(.*)$"
    lines = [*re.findall(fence, text, re.MULTILINE | re.DOTALL), *re.findall(block, text, re.M)]
    prose = re.sub(fence, "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(block, "", prose, flags=re.MULTILINE))
    lines += [" ".join(span.split()) for span in spans]
    found = re.findall(r"python train\.py (\w.*)", "\n".join(lines))
    whole = [line for line in found if "..." not in line and "$" not in line]
    split = {tuple(shlex.split(line, comments=True)) for line in whole}
    return sorted(line for line in split if len(line) > 1)  # a command alone is only mentioned


class ParsedError(Exception):
    """The command line was understood."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_commands_parse(page, command, monkeypatch, capsys):
    def stop(*_, **__):
        raise ParsedError

    def parse_and_stop(parser, arguments=None, namespace=None):
        given, rest = original(parser, arguments, namespace)
        raise ParsedError(given, rest)

    original = CommandParser.parse_known_args
    monkeypatch.setattr(LoraCLI, "instantiate_classes", stop)
    monkeypatch.setattr(CommandParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr("app.commands.theory.command.new_run_folder", stop)

    def parse(*argv):
        try:
            status = command(*argv)
        except ParsedError as parsed:
            return parsed.args
        except SystemExit as ended:  # of --help and --print_config
            status = ended.code
        assert status == 0, (argv, capsys.readouterr().err)
        return ()

    for name, *options in commands(page):
        # The folder of a run stands for the configuration that it was trained with.
        if name in ("test", "validate"):
            line = re.sub(r"--run runs/(\w+)/version_\w+", r"--config \1.yaml", " ".join(options))
            options = line.replace("NAME.yaml", "quickstart.yaml").split()
        if "methods/orthogonal.yaml" in options:
            continue
        parsed = parse(name, *options)
        if name in ("export", "report", "dashboard"):
            assert parsed[1] == [], parsed
        if name in ("compare", "init", "one_step"):
            given, rest = parsed
            files = getattr(given, "config", [])  # of the others, among the rest
            parse("fit", *(f"--config={file}" for file in files), *rest)
