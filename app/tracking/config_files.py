"""Find configuration files by name, as given or below `configs/`, and those of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from app.tracking.run_folder import RunFolder
from app.utils.class_paths import bare_name, exists, in_current_settings, shorten_class_paths
from app.utils.errors import InputError
from app.utils.files import read_yaml
from app.utils.text import did_you_mean

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = PROJECT / "configs"
RENAMED = {"callbacks/inside": "callbacks/alignment.yaml"}
"""Files of earlier versions, without their suffix, and what they are called now."""
METHOD_SWITCHES = (
    "--model.adapter.use_rslora=true",
    "--model.adapter.use_dora=false",
    "--model.adapter.adalora=null",
)
"""What every file in `configs/methods/` begins from, so that it names only what its method has otherwise."""
LISTS = ("callbacks", "logger", "plugins")
"""Settings of the trainer that hold several classes; `callbacks+` in a file appends to the list."""


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace config names by paths, and `--run FOLDER` by that run's config and adapter or model.

    `--merged DTYPE` makes it the model that `export --merge --dtype DTYPE` writes, computed in that type.
    Of several overlays in `configs/methods/` the last one counts: what another one has set to null, such as
    the initialization, could not be had back. Those in `configs/callbacks/` come behind all other files, and
    add nothing where their callbacks are listed already.

    Raises:
        InputError: A file is missing or is no YAML, or an option sets what a file has switched off.
    """
    expanded: list[str] = []
    merged: list[str] = []
    off: dict[str, Path] = {}
    lists: dict[str, dict[str, str]] = {}
    named = _appended_last(_named_files(arguments))
    methods = [
        i
        for i, (option, name) in enumerate(named)
        if option == "--config" and _is_overlay("methods", name)
    ]
    for i, (option, value) in enumerate(named):
        if i in methods[:-1]:
            continue
        if i in methods:
            expanded += METHOD_SWITCHES
        if option == "--run":
            run = RunFolder(Path(value))
            run.check_finished()
            _note_lists(lists, f"--config {run.config}", read_yaml(run.config, "--run"))
            whole = run.model.is_dir()
            trained = f"name={run.model}" if whole else f"adapter_path={run.adapter}"
            expanded += [f"--config={_current(run.config)}", f"--model.{trained}"]
        elif option == "--merged":
            merged = [f"--model.merged={value}", "--trainer.precision=32-true"]
        elif option == "--config":
            path = find_config(value)
            content = read_yaml(path, "--config")
            if _is_overlay("callbacks", value) and _appends_nothing(lists, content):
                continue  # on the configuration of a run that had the overlay
            _note_null(off, path, content)
            _note_lists(lists, f"--config {path}", content)
            expanded.append(f"--config={_current(path)}")
        else:
            expanded.append(value)
            _check_not_off(off, value)
            name, equals, given = value.removeprefix("--").partition("=")
            section, *keys = name.split(".")
            if value.startswith("--") and section == "trainer" and len(keys) < 2:
                given = given if equals else "".join(v for _, v in named[i + 1 : i + 2])
                _note_lists(lists, f"--{name}", _section(name, given))
    return expanded + merged


def _current(path: Path) -> str:
    """Return a file, or its content in today's names if its classes or their settings have changed since."""
    text = path.read_text(encoding="utf-8")
    current = shorten_class_paths(text, lambda name: not exists(name))
    current = in_current_settings(current)
    return str(path) if current == text else current


def _named_files(arguments: Sequence[str]) -> list[tuple[str | None, str]]:
    """Return the arguments in order: `--config`, `--run` or `--merged` with its value, others behind None."""
    pairs: list[tuple[str | None, str]] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c", "--run", "--merged"):
            name = "--config" if option == "-c" else option
            pairs.append((name, value if equals else next(rest, "")))
        else:
            pairs.append((None, argument))
    return pairs


def _is_overlay(kind: str, name: str) -> bool:
    return find_config(name).resolve().parent == CONFIGS / kind


def _appended_last(named: list[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
    """Move overlays that append callbacks, and the options of callbacks, behind everything else.

    A file that sets the list would replace what an overlay before it has appended.
    """
    if not any(o == "--config" and _is_overlay("callbacks", name) for o, name in named):
        return named
    others: list[tuple[str | None, str]] = []
    appended: list[tuple[str | None, str]] = []
    target = others
    for option, value in named:
        if option is not None or value.startswith("--"):  # else the value of the option before
            overlay = option == "--config" and _is_overlay("callbacks", value)
            target = appended if overlay or value.startswith("--trainer.callbacks") else others
        target.append((option, value))
    return others + appended


def _section(name: str, given: str) -> dict[str, Any]:
    """Return what an option `trainer` or `trainer.KEY` sets, as a file has it."""
    try:
        value = yaml.safe_load(given)
    except yaml.YAMLError:
        value = given  # which the parser refuses
    section, _, key = name.partition(".")
    return {section: {key: value} if key else value}


def _note_lists(lists: dict[str, dict[str, str]], source: str, content: dict[str, Any]) -> None:
    """Note the classes in the trainer's lists; warn of those that a file or option drops by setting one anew.

    Args:
        lists: Of each list its classes so far, by name, with the source of each.
        source: `--config FILE`, or an option.
        content: Of the file, or what the option sets.
    """
    trainer = content.get("trainer")
    for key, value in trainer.items() if isinstance(trainer, dict) else ():
        name = key.removesuffix("+")
        kinds = _classes(value)
        if name not in LISTS or not kinds:
            continue
        before = lists.get(name, {})
        new = {_last(kind) for kind in kinds}
        dropped = [kind for kind in before if _last(kind) not in new and name == key]
        if dropped:
            from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # not for `report`

            instead = f"{name}+ there" if source.startswith("--config") else f"--trainer.{name}+"
            rank_zero_warn(
                f"{source} sets trainer.{name}, which drops {', '.join(dropped)} of "
                f"{before[dropped[0]].removeprefix('--config ')}: write {instead} to append to the list"
            )
        lists[name] = {**(before if name != key else {}), **dict.fromkeys(kinds, source)}


def _classes(value: Any) -> list[str]:
    """Return the classes that a list of the trainer names, or one entry of it."""
    parts = value if isinstance(value, list) else [value]
    named = (part.get("class_path") if isinstance(part, dict) else part for part in parts)
    return [kind for kind in named if isinstance(kind, str)]


def _appends_nothing(lists: dict[str, dict[str, str]], content: dict[str, Any]) -> bool:
    """Return whether all callbacks that an overlay appends are listed already."""
    there = {_last(kind) for kind in lists.get("callbacks", ())}
    appended = {_last(kind) for kind in _classes(content.get("trainer", {}).get("callbacks+"))}
    return bool(appended) and appended <= there


def _last(kind: str) -> str:
    """Return the name of a class without its module, as an earlier version or a user may have written that."""
    return bare_name(kind).rpartition(".")[2]


def _note_null(
    off: dict[str, Path], path: Path, content: Mapping[str, Any], prefix: str = ""
) -> None:
    """Note which sections a file sets to null, such as `init` in methods/lora.yaml, and which it sets again.

    The parser would take `--init.gamma 64` after that file for the initialization that an earlier file named,
    and bring it back without a word.
    """
    for key, value in content.items():
        # `data.init_args.evals` is short for `data.evals`
        name = prefix if key == "init_args" else f"{prefix}{key}."
        off.pop(name, None)
        if isinstance(value, Mapping):
            _note_null(off, path, value, name)
        elif value is None:
            off[name] = path


def _check_not_off(off: dict[str, Path], argument: str) -> None:
    """Raise InputError if an option is below a section that is off; the option that sets it switches it on."""
    if not argument.startswith("--"):
        return
    given = argument.removeprefix("--").partition("=")[0]
    *above, last = [part for part in given.split(".") if part != "init_args"]
    sections = [".".join(above[: i + 1]) + "." for i in range(len(above))]
    whole = given + "." if last != "class_path" else sections[-1] if sections else ""
    off.pop(whole, None)
    for section in sections:
        if section in off:
            name = section.removesuffix(".")
            raise InputError(
                f"{given} is given, but {off[section]} has set {name} to null: leave the option out, "
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
    wanted = name.removesuffix(".yaml")
    if wanted in RENAMED:
        raise InputError(f"--config is {name!r}, which is now called {RENAMED[wanted]}")
    raise InputError(
        f"--config is {name!r}, which is neither a file nor a name in configs/"
        f"{did_you_mean(f'{wanted}.yaml', known) or '.'} There are: {', '.join(known)}"
    )
