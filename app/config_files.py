"""Configuration files by name: as given, then below `configs/`; and a finished run's as one."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from app.errors import InputError
from app.run_folder import ADAPTER_FOLDER, CONFIG_FILE, MODEL_FOLDER, check_run_folder

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace config names by paths, and `--run FOLDER` by that run's config and adapter or model."""
    expanded: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c", "--run"):
            expanded.append(argument)
            continue
        if not equals:
            value = next(waiting, "")
        if option == "--run":
            folder = Path(value)
            check_run_folder(folder)
            expanded += [f"--config={folder / CONFIG_FILE}"]
            if (folder / MODEL_FOLDER).is_dir():
                expanded += [f"--model.name={folder / MODEL_FOLDER}"]
            else:
                expanded += [f"--model.adapter_path={folder / ADAPTER_FOLDER}"]
        else:
            path = find_config(value)
            _check_yaml(path)
            expanded.append(f"--config={path}")
    return expanded


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
    close = difflib.get_close_matches(wanted, stems, n=1, cutoff=0.5)
    hint = f" Did you mean {stems[close[0]]}?" if close else ""
    raise InputError(
        f"--config is {name!r}, which is neither a file nor a name in configs/.{hint} "
        f"There are: {', '.join(known)}"
    )


def _check_yaml(path: Path) -> None:
    """Refuse a file that is no YAML mapping, by its name: the parser names none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise InputError(f"--config {path} cannot be read as YAML: {told}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"--config {path} holds {type(content).__name__}: expected sections such as model:, data:"
        )
