"""Read, write, hash and lock files; a file is written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

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


def cache_root() -> Path:
    """Return the folder of all cached files.

    That is $LORA_ONE_CACHE, or else $XDG_CACHE_HOME/lora-one, or else ~/.cache/lora-one.
    """
    if chosen := os.environ.get("LORA_ONE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "lora-one"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
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
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends, and is removed after an error."""
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PART}")  # nobody else's
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON data to a file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(data, indent=2) + "\n").encode())
