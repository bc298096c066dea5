"""Read rows of TSV, CSV, JSON and JSON lines, plain or gzipped, of tar archives and of the Hub."""

import codecs
import csv
import functools
import gzip
import io
import json
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from app.utils.errors import InputError

PROBE_TIMEOUT_S = 5.0
TOLD_FROM_BYTES = 2**25

Row = Mapping[str, Any]
LocatedRow = tuple[str, Row]
"""Where a row stands, for messages, and the row."""


def published_rows(
    path: str | None, hub_id: str, config: str, split: str, fields: Sequence[str], setting: str
) -> Iterator[LocatedRow]:
    """Read a local file or, without a path, a set of the Hub; see `file_rows` and `hub_rows`."""
    if path is None:
        return hub_rows(hub_id, config, split, fields, setting)
    return file_rows(pathlib.Path(path), fields, setting)


def file_rows(
    file: pathlib.Path,
    fields: Sequence[str],
    setting: str,
    types: tuple[type, ...] = (str,),
    header: Sequence[str] | None = None,
) -> Iterator[LocatedRow]:
    """Read a .tsv file, or one JSON list of objects, or one JSON object a line.

    Args:
        file: Plain or gzipped (.gz) UTF-8.
        fields: What each row must have.
        setting: The setting that names the file, for messages.
        types: What a field may be.
        header: Columns of a .tsv file without a header line.

    Yields:
        Where a row stands, and the row.

    Raises:
        InputError: The file cannot be read, or a row has another form or lacks a field.
    """
    content = file_content(file, setting).removeprefix(codecs.BOM_UTF8)
    if ".tsv" in file.suffixes:
        rows = tsv_rows(content, str(file), setting, header)
    elif content.lstrip().startswith(b"["):
        rows = _json_list(content, str(file), setting)
    else:
        rows = _json_lines(content, str(file), setting)
    for where, row in rows:
        yield where, with_fields(row, fields, where, setting, types)


def hub_rows(
    hub_id: str,
    config: str,
    split: str,
    fields: Sequence[str],
    setting: str,
    types: tuple[type, ...] = (str, int, list),
) -> Iterator[LocatedRow]:
    """Read a set of the Hub; see `load_from_hub` and `file_rows`."""
    for number, row in enumerate(load_from_hub(hub_id, config, split, setting)):
        where = f"row {number} of {hub_id} {split}"
        yield where, with_fields(row, fields, where, setting, types)


def load_from_hub(hub_id: str, config: str | None, split: str | None, setting: str) -> Any:
    """Return a split of a set of the Hub, or all by their names; without a network it comes from its cache.

    Raises:
        InputError: There is no such set, or no way to it.
    """
    import datasets  # slow, as pandas comes with it; other rows are read without

    offline = datasets.config.HF_HUB_OFFLINE
    # Without the Hub the library would retry for half a minute.
    datasets.config.HF_HUB_OFFLINE = offline or not _reachable(hub_id)
    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        named = f"{hub_id} ({config})" if config else hub_id
        raise InputError(
            f"cannot load {named}: {error}. Expected a network or a filled cache; or name a local copy in "
            f"{setting}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@functools.cache
def _reachable(hub_id: str) -> bool:
    """Ask the Hub for a set, once for all of its splits; return whether it answers."""
    try:
        HfApi().dataset_info(hub_id, timeout=PROBE_TIMEOUT_S)
    except (OSError, HTTPError):
        return False
    return True


def file_content(file: pathlib.Path, setting: str) -> bytes:
    """Return the bytes of a plain or gzipped file.

    Raises:
        InputError: There is no such file, or it is broken.
    """
    try:
        if (size := file.stat().st_size) >= TOLD_FROM_BYTES:
            rank_zero_info(f"reading {file} ({size / 2**20:,.0f} MiB)")
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {file} ({error}): change {setting}") from error


def archive_content(
    archive: pathlib.Path, names: Sequence[str], setting: str, most_bytes: int = 2**30
) -> dict[str, bytes]:
    """Return the regular files of a tar archive that have the names, whatever their folder.

    Nothing is unpacked to disk.

    Raises:
        InputError: The archive is broken, lacks a file, or has one of more than `most_bytes`.
    """
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = pathlib.PurePosixPath(member.name).name
                if name in names and member.isfile():
                    stream = opened.extractfile(member)
                    content[name] = b"" if stream is None else stream.read(most_bytes + 1)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"cannot read {archive} ({error}): change {setting}") from error
    for name in names:
        if name not in content:
            raise InputError(f"{archive} has no file {name}: expected one; change {setting}")
        if len(content[name]) > most_bytes:
            raise InputError(
                f"{name} of {archive} has more than {most_bytes} bytes: expected fewer; change {setting}"
            )
    return content


def tsv_rows(
    content: bytes, name: str, setting: str, header: Sequence[str] | None = None
) -> Iterator[LocatedRow]:
    """Split lines at tabs and nothing else, since quotes and number signs are text.

    Without a `header` the first line names the columns; `name` and `setting` are for messages.
    """
    for where, line in _lines(content, name, setting):
        cells = line.split("\t")
        if header is None:
            header = cells
            if twice := [column for column in cells if column and cells.count(column) > 1]:
                raise InputError(
                    f"{name} has two columns {twice[0]!r}: expected one of each name; correct it, or change "
                    f"{setting}"
                )
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif line.strip():
            raise InputError(
                f"{where} has {len(cells)} columns: expected {len(header)} ({', '.join(header)}); "
                f"correct it, or change {setting}"
            )


def csv_cells(content: bytes, name: str, setting: str) -> Iterator[tuple[str, list[str]]]:
    """Read quoted cells as text: 'None' and 'TRUE' are words, and a cell may have several lines."""
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(content.decode("utf-8")))):
            yield f"row {number} of {name}", cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {name} ({error}): change {setting}") from error


def with_fields(
    row: Any, fields: Sequence[str], where: str, setting: str, types: tuple[type, ...] = (str,)
) -> Row:
    """Return a row after a check of its fields."""
    change = f"correct it, or change {setting}"
    missing = [f for f in fields if f not in row] if isinstance(row, Mapping) else fields
    if missing:
        present = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(
            f"{where} has {present or 'nothing'}: expected the fields {', '.join(fields)} as text; {change}"
        )
    for field in fields:
        if not isinstance(row[field], types):
            shown = json.dumps(row[field], default=repr)[:40]
            raise InputError(f"{where} has {shown} as {field}: expected text; {change}")
    return row


def _lines(content: bytes, name: str, setting: str) -> Iterator[tuple[str, str]]:
    """Yield each line and where it stands; only a line feed ends it, a byte order mark is no text."""
    try:
        for number, line in enumerate(io.BytesIO(content), 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield f"line {number} of {name}", text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"cannot read {name} ({error}): expected UTF-8 text; change {setting}"
        ) from error


def _json_lines(content: bytes, name: str, setting: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(content, name, setting):
        if line.strip():
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{where} is no JSON ({error}): expected one list of rows, or an object a line; "
                    f"change {setting}"
                ) from error


def _json_list(content: bytes, name: str, setting: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise InputError(f"{name} is no JSON ({error}): change {setting}") from error
    for number, row in enumerate(rows):
        yield f"row {number} of {name}", row
