"""compare.json: what a comparison's runs share, each method's settings, and the cells ever asked for."""

import fcntl
import warnings
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ValidationError

from app.commands.compare.cells import CELLS_FOLDER, Cell
from app.commands.compare.settings import Settings, differences, differences_text, flat
from app.tracking.run_folder import run_folders
from app.utils.errors import InputError
from app.utils.files import write_json

MANIFEST_FILE = "compare.json"
MANIFEST_LOCK = "compare.lock"

FlatSettings = Annotated[Settings, AfterValidator(flat)]
"""Settings whose classes are named as in this version."""


class GridManifest(BaseModel, frozen=True):
    """What a comparison was asked for.

    Attributes:
        task: The settings that all runs share; None where the file does not say.
        methods: The settings of each method, without the learning rate, by the name of its `Variant`.
        benchmarks: The settings of each benchmark that finished runs are asked, by its name.
        cells: The cells.
    """

    task: FlatSettings | None = None
    methods: dict[str, FlatSettings] = {}
    benchmarks: dict[str, FlatSettings] = {}
    cells: list[Cell] = []


def update_manifest(folder: Path, asked: GridManifest) -> None:
    """Add what is asked for now to what a comparison's folder was asked for before.

    Raises:
        InputError: The folder cannot be written, or holds a comparison of another task, or has a method or
            a benchmark with other settings; the file is then as it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / MANIFEST_LOCK).open("a")
    except OSError as error:
        raise InputError(
            f"the folder {str(folder)!r} cannot be written ({error.strerror}): set --name or output.root"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = _merge(folder, _valid_manifest(folder), asked)
        write_json(folder / MANIFEST_FILE, merged.model_dump())


def _merge(folder: Path, before: GridManifest, asked: GridManifest) -> GridManifest:
    """Return both manifests as one; raise InputError where their settings differ."""
    other = "(then, now). Give this one another --name"
    differ = differences(before.task, asked.task or {}) if before.task else {}
    if differ and not any(run_folders(folder / CELLS_FOLDER / c.name) for c in before.cells):
        return asked  # nothing has been trained that it could be mixed with
    if differ:
        text = f"{differences_text(differ)} {other}"
        raise InputError(f"{folder} holds a comparison of another task: {text}")
    for kind, then, now in (
        ("method", before.methods, asked.methods),
        ("benchmark", before.benchmarks, asked.benchmarks),
    ):
        for name in then.keys() & now.keys():
            differ = differences(then[name], now[name])
            if differ:
                text = f"{differences_text(differ)} {other}"
                raise InputError(f"{folder} has other settings of the {kind} {name}: {text}")
    return GridManifest(
        task=asked.task,
        methods={**before.methods, **asked.methods},
        benchmarks={**before.benchmarks, **asked.benchmarks},
        cells=list(dict.fromkeys([*before.cells, *asked.cells])),
    )


def _valid_manifest(folder: Path) -> GridManifest:
    """Return the manifest; raise InputError for a file that is none, which would be overwritten."""
    try:
        return GridManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return GridManifest()
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{folder / MANIFEST_FILE} is no list of this comparison's cells "
            f"({' '.join(str(error).split())}): correct it, or give another --name"
        ) from error


def read_manifest(folder: Path) -> GridManifest:
    """Return what a comparison was asked for; an empty manifest, with a warning, for a damaged file."""
    try:
        return _valid_manifest(folder)
    except InputError as error:
        warnings.warn(f"{error}. Every run below it is reported", stacklevel=2)
        return GridManifest()
