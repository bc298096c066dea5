"""Random single mistakes in command lines and files, each made by a seed."""

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.wrong_command_lines import (
    COMMANDS_OF_FIELDS,
    COMMANDS_OF_FILES,
    RUN,
    WRONG_COMMAND_LINES,
    setting_of,
)


@dataclass(frozen=True)
class Mistake:
    """One mistake, already made in the files of the working folder."""

    kind: str
    argv: tuple[str, ...]
    named: tuple[str, ...]  # the message has one of these
    what: str  # for whoever reads a failure


def misspelt(word: str, rng: random.Random) -> str:
    """Drop, double, swap or replace one letter of the last part of a name."""
    head, dot, last = word.rpartition(".")
    letters = [i for i, c in enumerate(last) if c.isalpha()]
    at = rng.choice(letters)
    other = rng.choice("abcdefghijklmnopqrstuvwxyz")
    changed = rng.choice(
        [
            last[:at] + last[at + 1 :],
            last[: at + 1] + last[at:],
            last[:at] + last[at + 1 : at + 2] + last[at] + last[at + 2 :],
            last[:at] + other + last[at + 1 :],
        ]
    )
    if changed in (last, ""):
        changed = last + other + "q"
    return head + dot + changed


def leaves(section: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every setting of a configuration that is no section."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def changed(
    config: dict[str, Any], path: tuple[str, ...], edit: Callable[[dict, str], None]
) -> str:
    """Return a configuration as YAML after `edit(section, key)` at a path."""
    copy = json.loads(json.dumps(config))
    section = copy
    for key in path[:-1]:
        section = section[key]
    edit(section, path[-1])
    return yaml.safe_dump(copy, sort_keys=False)


def setting(path: tuple[str, ...]) -> str:
    """Return the name of a setting as messages have it, without `init_args`."""
    return ".".join(key for key in path if key != "init_args")


WRONG_TYPES: dict[type, list[Any]] = {
    bool: ["perhaps", 1.5, [True], {"a": 1}],
    int: ["many", "2.5", "[1, 2]", {"a": 1}, "1 0"],
    float: ["big", "[0.1]", {"a": 1}, "1,5"],
    list: [5, {"a": 1}],
    type(None): [{"a": {"b": 1}}, [[1]]],
}
OUT_OF_RANGE: tuple[float, ...] = (-1, 0, -3, 10**12, float("nan"), float("inf"), -0.5, 1e-300)


ENDLESS = ("max_steps", "max_epochs", "max_time")
"""Settings that are right with any number, and train for as long."""


class Mistakes:
    """The mistakes that can be made in one working folder.

    Args:
        config: The whole configuration of a fit, all of whose files are named below the working folder.
        folder: The working folder: model/, data/, config.yaml, rows.jsonl, `RUN` with a checkpoint.
    """

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.leaves = dict(leaves(config))
        self.kinds = {
            name.removeprefix("_make_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("_make_")
        }

    def make(self, seed: int) -> Mistake:
        """Make the mistake of a seed."""
        rng = random.Random(seed)
        kind = sorted(self.kinds)[seed % len(self.kinds)]
        return self.kinds[kind](rng)

    def _of_config(
        self, kind: str, path: tuple[str, ...], value: Any, rng: random.Random
    ) -> Mistake:
        """Set a setting in the file, or on the command line."""
        command = rng.choice(["fit", "fit", "plan", "test", "validate"])
        base = ("--run", RUN) if command in ("test", "validate") else ("--config", "config.yaml")
        name = setting(path)
        if command in ("fit", "plan") and rng.random() < 0.5:

            def edit(section: dict, key: str) -> None:
                section[key] = value

            (self.folder / "config.yaml").write_text(changed(self.config, path, edit))
            argv = (command, *base)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            argv = (command, *base, f"--{'.'.join(path) if rng.random() < 0.5 else name}={text}")
        section = name.removesuffix(".class_path").rpartition(".")[0]
        # Lightning and optimizers name no setting, so that the section stands for it.
        named = (name, path[-1], section, name.removesuffix(".class_path"))
        return Mistake(kind, argv, named, f"{name}={value!r}")

    def _make_misspelt_setting(self, rng: random.Random) -> Mistake:
        path = rng.choice(sorted(self.leaves))
        wrong = misspelt(path[-1], rng)
        command = rng.choice(["fit", "plan", "test", "validate"])
        name = setting((*path[:-1], wrong))
        if command in ("fit", "plan") and rng.random() < 0.5:

            def edit(section: dict, key: str) -> None:
                section[wrong] = section.pop(key)

            (self.folder / "config.yaml").write_text(changed(self.config, path, edit))
            argv: tuple[str, ...] = (command, "--config", "config.yaml")
        else:
            base = (
                ("--run", RUN) if command in ("test", "validate") else ("--config", "config.yaml")
            )
            argv = (command, *base, f"--{name}", "1")
        return Mistake("misspelt setting", argv, (name, wrong), f"{'.'.join(path)} as {wrong}")

    def _make_wrong_type(self, rng: random.Random) -> Mistake:
        path = rng.choice([p for p, v in sorted(self.leaves.items()) if type(v) in WRONG_TYPES])
        value = rng.choice(WRONG_TYPES[type(self.leaves[path])])
        return self._of_config("wrong type", path, value, rng)

    def _make_out_of_range(self, rng: random.Random) -> Mistake:
        numbers = [
            path
            for path, value in sorted(self.leaves.items())
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        path = rng.choice([path for path in numbers if path[-1] not in ENDLESS])
        whole = isinstance(self.leaves[path], int)
        values = [v for v in OUT_OF_RANGE if not whole or isinstance(v, int)]
        return self._of_config("out of range", path, rng.choice(values), rng)

    def _make_name_of_nothing(self, rng: random.Random) -> Mistake:
        names = [
            path
            for path, value in sorted(self.leaves.items())
            if isinstance(value, str) and path[-1] not in ("root",)
        ]
        path = rng.choice(names)
        value = rng.choice(["nothing", misspelt(self.leaves[path], rng), "no/such/thing", ""])
        return self._of_config("name of nothing", path, value, rng)

    def _make_wrong_command_line(self, rng: random.Random) -> Mistake:
        argv, *named = rng.choice(WRONG_COMMAND_LINES)
        return Mistake("wrong command line", tuple(argv.split()), tuple(named), argv)

    def _make_damaged_file(self, rng: random.Random) -> Mistake:
        name = rng.choice(sorted(COMMANDS_OF_FILES))
        damage = rng.choice(["truncated", "bytes", "UTF-16", "empty", "absent", "folder", "other"])
        self._damage(self.folder / name, damage, rng)
        argv = rng.choice(COMMANDS_OF_FILES[name])
        named = (name, Path(name).name, setting_of(name))
        return Mistake(f"file {damage}", tuple(argv.split()), named, f"{name} {damage}")

    @staticmethod
    def _damage(file: Path, damage: str, rng: random.Random) -> None:
        content = file.read_bytes()
        plain = gzip.decompress(content) if file.suffix == ".gz" else content
        pack = gzip.compress if file.suffix == ".gz" else bytes
        at = rng.randrange(1, max(2, len(content) - 2))
        if damage == "truncated":
            file.write_bytes(content[:at])
        elif damage == "bytes":
            at = rng.randrange(len(plain))
            file.write_bytes(pack(plain[:at] + b"\xff\xfe\x80" + plain[at:]))
        elif damage == "UTF-16":
            file.write_bytes(pack(plain.decode("utf-8", "replace").encode("utf-16")))
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "absent":
            file.unlink()
        elif damage == "folder":
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(pack(b"<html><body>404: Not Found</body></html>\n"))

    def _make_field(self, rng: random.Random) -> Mistake:
        """Remove a field of a JSON file, or give it a value of another type."""
        name = rng.choice(sorted(COMMANDS_OF_FIELDS))
        file = self.folder / name
        content = json.loads(file.read_text())
        holders = [content] if isinstance(content, dict) else [rng.choice(content)]
        holders += [value for value in holders[0].values() if isinstance(value, dict) and value]
        holder = rng.choice(holders)
        # PEFT has fields for methods of its own, which it checks where they are used.
        key = rng.choice(sorted(key for key, value in holder.items() if value is not None))
        if rng.random() < 0.5:
            del holder[key]
            what = f"{name} without {key}"
        else:
            holder[key] = rng.choice([None, 5, "x", [1], {"a": 1}, -1, True])
            what = f"{name} with {key} {holder[key]!r}"
        file.write_text(json.dumps(content))
        argv = rng.choice(COMMANDS_OF_FIELDS[name])
        named = (name, file.name, key, setting_of(name))
        return Mistake("field", tuple(argv.split()), named, what)

    def _make_row(self, rng: random.Random) -> Mistake:
        """Break one line of a data file."""
        name = rng.choice(["rows.jsonl", "data/SST-2/train.tsv"])
        lines = (self.folder / name).read_text().splitlines()
        at = rng.randrange(0 if name == "rows.jsonl" else 1, len(lines))
        if name == "rows.jsonl":
            row = json.loads(lines[at])
            field = rng.choice(["instruction", "output"])
            row[field] = rng.choice([None, 5, "", " ", ["a"], {"a": "b"}])
            lines[at] = rng.choice(
                [
                    json.dumps(row),
                    lines[at][:-3],
                    "",
                    "null",
                    "[]",
                    "5",
                    lines[at].replace(field, "x"),
                ]
            )
            argv = rng.choice(["fit", "plan"]) + " --config rows.yaml"
        else:
            line = lines[at]
            broken = [
                line + "\tx",
                line.replace("\t", " "),
                line[:-1],
                line[:-1] + "7",
                "\t",
                "a film\tx",
            ]
            lines[at] = rng.choice(broken)
            argv = rng.choice(["fit", "plan"]) + " --config config.yaml"
        (self.folder / name).write_text("\n".join(lines) + "\n")
        named = (f"line {at + 1}", f"row {at}", f"row {at - 1}", name)
        return Mistake("row", tuple(argv.split()), named, f"line {at + 1} of {name}: {lines[at]!r}")

    def _make_option_of_grid(self, rng: random.Random) -> Mistake:
        """Give `compare` a wrong setting of its runs."""
        path = rng.choice(sorted(self.leaves))
        is_number = type(self.leaves[path]) in (int, float)
        wrong = path[-1] if is_number and rng.random() < 0.5 else misspelt(path[-1], rng)
        value = "many" if wrong == path[-1] else "1"
        name = setting((*path[:-1], wrong))
        grid = ("--config=config.yaml", "--methods=lora_one", "--learning_rates=1e-3")
        argv = ("compare", *grid, f"--{name}={value}")
        return Mistake("option of compare", argv, (name, wrong), f"{name}={value}")


def is_one_line(told: str) -> bool:
    """Return whether the standard error has one line that begins with `error: ` and no traceback."""
    return "Traceback" not in told and len(re.findall("^error: ", told, re.MULTILINE)) == 1


def is_named(line: str, mistake: Mistake) -> bool:
    """Return whether a message has one of a mistake's names as a whole word; a letter alone is none."""
    names = [name for name in mistake.named if len(name) > 1]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", line) for name in names)
