"""Read, write, hash and lock files; a file is written whole or not at all."""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import yaml
from filelock import FileLock

from app.utils.errors import InputError

PART = ".part"
"""End of a file's name until it is complete."""


def digest(text: str) -> str:
    """Return a short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def load_yaml(text: str) -> Any:
    """Return what a YAML text holds, read by libyaml, which is ten times as fast as PyYAML's own parser."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_yaml(path: Path, setting: str) -> dict[str, Any]:
    """Return the sections of a YAML file.

    Args:
        path: The file.
        setting: The option that names it, for messages.

    Raises:
        InputError: The file cannot be read, or is no YAML mapping.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise InputError(f"{setting} {path} cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{setting} {path} holds {type(content).__name__}: expected sections such as model:, data:"
        )
    return content


def absolute_folder(name: str) -> str:
    """Return the absolute path of a folder that exists; any other name, such as one of the Hub, as it is."""
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if os.path.isdir(folder) else name


def cache_root() -> Path:
    """Return the folder of all cached files.

    That is $LORA_ONE_CACHE, or else $XDG_CACHE_HOME/lora-one, or else ~/.cache/lora-one.
    """
    if chosen := os.environ.get("LORA_ONE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "lora-one"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; its bytes are read again if it has changed."""
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`, making its folder: one process at a time writes `path`."""
    lock = path.with_name(path.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a"):
            pass
    except OSError as error:
        raise InputError(
            f"The cache folder {lock.parent} cannot be written ({error}). "
            "Set the environment variable LORA_ONE_CACHE to a folder that can."
        ) from error
    with FileLock(lock):
        yield


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends, synced to disk; after an error `path` is as before.

    Its name until then is that of `path` with `.part` behind.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power failure, not only the content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path, update: bool = False) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends, and is removed after an error.

    A folder `path` that holds files is an OSError; with `update` each new file replaces that of its name.
    Its files can be read by whom the umask lets read new files: safetensors writes them for their owner alone.
    Unfinished folders for `path` whose processes were killed are removed.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PART}")  # nobody else's
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_the_end:
        with _folder_lock(path.parent):  # no unfinished folder is without its lock then
            _remove_abandoned(path)
            part.mkdir()
            until_the_end.enter_context(_folder_lock(part))
        try:
            yield part
            _obey_umask(part)
            if update and path.is_dir():
                _move_files(part, path)
            else:
                part.replace(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _move_files(source: Path, target: Path) -> None:
    """Move all files of a folder to the same places in another one, and remove the folder."""
    for file in [path for path in source.rglob("*") if path.is_file()]:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(source)


@contextmanager
def _folder_lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, until the process is killed at the longest; yield whether that is so.

    It is not where another process has the lock, unless we wait, nor on a file system without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove the unfinished folders for `path` whose processes no longer hold their locks."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}" + re.escape(PART))
    for folder in path.parent.iterdir():
        if ours.fullmatch(folder.name) and folder.is_dir():
            # Its process may be renaming it just now.
            with suppress(FileNotFoundError), _folder_lock(folder, wait=False) as held:
                if held:
                    shutil.rmtree(folder, ignore_errors=True)


def _obey_umask(folder: Path) -> None:
    """Give all files in a folder that we have just made the mode of a new file."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def write_json(path: Path, data: Any) -> None:
    """Write JSON data to a file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(data, indent=2) + "\n").encode())
