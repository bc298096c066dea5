"""Configuration files by name: as given, then below `configs/`; and a finished run's as one."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from app.tracking.run_folder import RunFolder
from app.utils.class_paths import exists, shorten_class_paths
from app.utils.errors import InputError

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = PROJECT / "configs"
RENAMED = {"callbacks/inside": "callbacks/alignment.yaml"}
"""Files of earlier versions, without their suffix, and what they are called now."""


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace config names by paths, and `--run FOLDER` by that run's config and adapter or model.

    Of several overlays in `configs/methods/` the last one counts: what another one has set to null, such as
    the start, could not be had back.

    Raises:
        InputError: A file is missing or is no YAML, or an option sets what a file has switched off.
    """
    expanded: list[str] = []
    off = SwitchedOff()
    named = _named_files(arguments)
    methods = [i for i, (option, value) in enumerate(named) if _is_method(option, value)]
    for i, (option, value) in enumerate(named):
        if i in methods[:-1]:
            continue
        if option is None:
            expanded.append(value)
            off.option(value)
        elif option == "--run":
            run = RunFolder(Path(value))
            run.check_finished()
            whole = run.model.is_dir()
            trained = f"name={run.model}" if whole else f"adapter_path={run.adapter}"
            expanded += [f"--config={_current(run.config)}", f"--model.{trained}"]
        else:
            path = find_config(value)
            off.file(path, _read_yaml(path))
            expanded.append(f"--config={_current(path)}")
    return expanded


def _current(path: Path) -> str:
    """Return a file, or its content with the bare names of classes that have moved since it was written."""
    text = path.read_text(encoding="utf-8")
    current = shorten_class_paths(text, lambda name: not exists(name))
    return str(path) if current == text else current


def _named_files(arguments: Sequence[str]) -> list[tuple[str | None, str]]:
    """Return the arguments in order: `--config` or `--run` with its value, any other with None before it."""
    found: list[tuple[str | None, str]] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c", "--run"):
            found.append((None, argument))
        else:
            found.append((option, value if equals else next(waiting, "")))
    return found


def _is_method(option: str | None, value: str) -> bool:
    named = option in ("--config", "-c")
    return named and find_config(value).resolve().parent == CONFIGS / "methods"


class SwitchedOff:
    """Sections that configuration files have set to null, such as `init` in methods/lora.yaml.

    The parser would take `--init.gamma 64` after that file for the start that an earlier file named, and
    bring it back without a word.
    """

    def __init__(self) -> None:
        self._by: dict[str, Path] = {}

    def file(self, path: Path, content: Mapping[str, Any]) -> None:
        """Note what a file sets to null, and what it sets to something else again."""
        self._note(path, content, "")

    def _note(self, path: Path, content: Mapping[str, Any], prefix: str) -> None:
        for key, value in content.items():
            # `data.init_args.evals` is short for `data.evals`
            name = prefix if key == "init_args" else f"{prefix}{key}."
            self._by.pop(name, None)
            if isinstance(value, Mapping):
                self._note(path, value, name)
            elif value is None:
                self._by[name] = path

    def option(self, argument: str) -> None:
        """Refuse an option below a section that is off.

        Raises:
            InputError: It is.
        """
        if not argument.startswith("--"):
            return
        given = argument.removeprefix("--").partition("=")[0]
        *above, last = [part for part in given.split(".") if part != "init_args"]
        sections = [".".join(above[: i + 1]) + "." for i in range(len(above))]
        whole = given + "." if last != "class_path" else sections[-1] if sections else ""
        self._by.pop(whole, None)
        for section in sections:
            if section in self._by:
                name = section.removesuffix(".")
                raise InputError(
                    f"{given} is given, but {self._by[section]} has set {name} to null: leave the option out, "
                    f"or set {name} before it"
                )


def find_config(name: str) -> Path:
    """Find a configuration file: as given, then below `configs/`.

    Raises:
        InputError: If there is none; names the closest and lists all.
    """
    for candidate in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
    stems = {path.removesuffix(".yaml"): path for path in known}
    wanted = name.removesuffix(".yaml")
    if wanted in RENAMED:
        raise InputError(f"--config is {name!r}, which is now called {RENAMED[wanted]}")
    close = difflib.get_close_matches(wanted, stems, n=1, cutoff=0.5)
    hint = f" Did you mean {stems[close[0]]}?" if close else ""
    raise InputError(
        f"--config is {name!r}, which is neither a file nor a name in configs/.{hint} "
        f"There are: {', '.join(known)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a file; refuse one that is no YAML mapping by its name: the parser names none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise InputError(f"--config {path} cannot be read as YAML: {told}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"--config {path} holds {type(content).__name__}: expected sections such as model:, data:"
        )
    return content
