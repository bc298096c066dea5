"""Read rows of CSV, TSV, JSON and Parquet files, folders of `save_to_disk` and the Hub by `datasets`.

Files are streamed: no more than a part of one is in memory.
"""

import codecs
import glob
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.utils.errors import InputError
from data_modules.readers import LocatedRow, load_from_hub

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

CSV = {"keep_default_na": False, "encoding": "utf-8-sig"}  # "null" and "NA" are words
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t", "quoting": 3}),  # csv.QUOTE_NONE: quotes are text
    ".json": ("json", {"encoding": "utf-8-sig"}),
    ".jsonl": ("json", {"encoding": "utf-8-sig"}),
    ".parquet": ("parquet", {}),
}
"""The reader of `datasets` and its options, by the file's ending; gzipped, .gz follows."""
KINDS = f"a file {', '.join(FORMATS)} (or .gz of it)"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
EXTRA_CELL = "__index_level_0__"  # pandas' name of a column that the header has no name for
SPLITS = ("train", "validation", "test")
READ_AT_ONCE = 1000  # rows
DAMAGED = (OSError, ValueError, TypeError, LookupError, EOFError, zlib.error, StopIteration)
"""What the readers raise of files that are cut short, or hold something else."""


class Table:
    """The rows of one set.

    Args:
        rows: As `datasets` reads them.
        name: The file, or the set of the Hub, for messages.
        setting: The setting that names it, for messages.
    """

    def __init__(self, rows: "Dataset | IterableDataset", name: str, setting: str) -> None:
        self.rows = rows
        self.name = name
        self.setting = setting

    def class_names(self, column: str) -> Sequence[str] | None:
        """Return the names of a column's classes, where they are stored with it (`ClassLabel`)."""
        feature = (self.rows.features or {}).get(column)
        return getattr(feature, "names", None)

    def __iter__(self) -> Iterator[LocatedRow]:
        """Yield where each row stands, and the row.

        Raises:
            InputError: The file is damaged, in another form or not UTF-8, or has no row.
        """
        number = 0
        for row in self._rows():
            where = f"row {number} of {self.name}"
            number += 1
            if EXTRA_CELL in row:
                header = ", ".join(repr(column) for column in row if column != EXTRA_CELL)
                raise InputError(
                    f"{where} has more cells than the {len(row) - 1} columns of the header ({header}): "
                    "expected as many, a cell with the separator in double quotes (.csv alone); correct it, or "
                    f"change {self.setting}"
                )
            yield where, row
        if number == 0:
            raise InputError(f"{self.name} has no rows: expected some; change {self.setting}")

    def _rows(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.rows.iter(batch_size=READ_AT_ONCE))  # forty times as fast as row by row
        while True:
            with _told(self.name, self.setting):
                batch = next(batches, None)
            if batch is None:
                return
            for cells in zip(*batch.values(), strict=True):
                yield dict(zip(batch, cells, strict=True))


def read_table(path: str, setting: str) -> Table:
    """Return the rows of a file.

    Raises:
        InputError: There is no such file, or its ending is none of `FORMATS`.
    """
    file = Path(path).expanduser()
    endings = [ending.lower() for ending in file.suffixes if ending.lower() != ".gz"]
    if not file.is_file():
        raise InputError(f"{setting}={path} is no file: expected {KINDS}; change {setting}")
    if not endings or endings[-1] not in FORMATS:
        raise InputError(f"cannot tell the form of {path}: expected {KINDS}; change {setting}")
    import datasets  # slow, as pandas comes with it; other rows are read without

    kind, options = FORMATS[endings[-1]]
    files = {"train": glob.escape(str(file.resolve()))}
    load = partial(datasets.load_dataset, kind, data_files=files, split="train", streaming=True)
    with _told(path, setting):
        if kind == "json":
            _check_first_value(file)
        if kind == "csv":
            _check_header(file, options)
        rows = load(**options)
        if kind == "csv" and (first := next(iter(rows), None)) and EXTRA_CELL not in first:
            # As text: the label 01 is not 1.
            features = datasets.Features({name: datasets.Value("string") for name in first})
            rows = load(**options, features=features)
    return Table(rows, path, setting)


def _check_first_value(file: Path) -> None:
    """Raise ValueError if a JSON file begins with `null`, on which pyarrow (26.0) ends the process."""
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
        if re.match(rb"\s*\[?\s*null", stream.read(99).removeprefix(codecs.BOM_UTF8)):
            raise ValueError("it begins with null: expected an object")


def _check_header(file: Path, options: Mapping[str, Any]) -> None:
    """Raise ValueError if two columns have one name, of which pandas would rename the second."""
    import pandas as pd

    names = pd.read_csv(file, header=None, nrows=1, dtype=str, **options).iloc[0]
    if (twice := names[names.duplicated() & (names != "")]).size:
        raise ValueError(f"it has two columns {twice.iloc[0]!r}: expected one of each name")


def read_tables(path: str, config_name: str | None, setting: str) -> dict[str, Table]:
    """Return the rows of each split of a file, which are for training, a folder or a set of the Hub.

    Args:
        path: A file; a folder that `save_to_disk` wrote; or the name of a set of the Hub, such as
            stanfordnlp/imdb.
        config_name: Which of the sets that the Hub has under one name.
        setting: The setting that names the path, for messages.

    Raises:
        InputError: None of them is there, or it has no rows for training.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        splits = _from_disk(place, setting)
    elif is_published(path):
        splits = load_from_hub(path, config_name, None, setting)
    else:
        return {"train": read_table(path, setting)}
    if not isinstance(splits, Mapping):
        splits = {"train": splits}
    if "train" not in splits:
        raise InputError(
            f"{path} has the splits {', '.join(splits)}: expected train; change {setting}"
        )
    return {
        split: Table(splits[split], f"{path} ({split})", setting)
        for split in SPLITS
        if split in splits
    }


def is_published(path: str) -> bool:
    """Return whether a path names a set of the Hub."""
    if Path(path).expanduser().exists() or HUB_ID.fullmatch(path) is None:
        return False
    return not any(path.lower().removesuffix(".gz").endswith(ending) for ending in FORMATS)


def _from_disk(folder: Path, setting: str) -> Any:
    import datasets

    try:
        with _told(str(folder), setting):
            return datasets.load_from_disk(str(folder))
    except InputError as error:
        raise InputError(
            f"{folder} is no folder that save_to_disk of datasets wrote ({error.__cause__}): expected one, or "
            f"{KINDS}; change {setting}"
        ) from error


@contextmanager
def _told(name: str, setting: str) -> Iterator[None]:
    """Turn what `datasets` raises of a file into an InputError.

    `datasets` logs nothing meanwhile, and does not ask the Hub, which would count the reading of a local file.
    """
    import datasets

    verbosity, offline = datasets.logging.get_verbosity(), datasets.config.HF_HUB_OFFLINE
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except (*DAMAGED, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or "it is empty"
        wanted = "expected UTF-8 text; " if isinstance(error, UnicodeError) else ""
        raise InputError(
            f"cannot read {name} ({reason}): {wanted}correct it, or change {setting}"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.config.HF_HUB_OFFLINE = offline
