"""The sandbox in which code that a model wrote is run, and whether this machine can build it.

`bubblewrap` puts the program into namespaces of its own: a user without rights, no network, no other
process, and of the file system the interpreter alone, read-only. `unprotected` does without: the program
sees and changes the files of the user who runs it. In both it is one process with one thread, without
capabilities, with limits, and without the system calls that seccomp.py denies. docs/sandbox.md has the
whole list, and what it was tried with.
"""

import json
import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

from app.utils.errors import InputError

SandboxMode = Literal["bubblewrap", "unprotected"]

HERE = Path(__file__).resolve().parent
CHILD_FILES = ("child.py", "wire_format.py", "seccomp.py")
NOBODY = "65534"
MEMORY_BYTES = 2**30
TEMPORARY_BYTES = 16 * 2**20
INSTALL = "apt-get install bubblewrap (dnf install bubblewrap, pacman -S bubblewrap)"


def limits(timeout: float) -> dict[str, int]:
    """Return the limits of a program's process.

    Args:
        timeout: Wall time of program and tests together, in seconds; the judge keeps that one.

    Returns:
        Names of the resource module with their values: bytes, seconds of CPU time, or numbers.
    """
    return {
        "RLIMIT_CPU": int(timeout) + 2,
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_FSIZE": TEMPORARY_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 1,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }


def sandbox_command(mode: SandboxMode, timeout: float) -> list[str]:
    """Return the command line that starts `child.py` in its sandbox."""
    arguments = ["-I", "-S", "-B"]
    if mode == "unprotected":
        child = str(HERE / "child.py")
        return [interpreter(), *arguments, child, json.dumps(limits(timeout))]
    child = "/sandbox/child.py"
    inside = [interpreter(), *arguments, child, json.dumps(limits(timeout))]
    return [*bubblewrap_options(), "--", *inside]


@cache
def interpreter() -> str:
    """Return the interpreter that runs in the sandbox: the one below a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@cache
def bubblewrap_options() -> tuple[str, ...]:
    """Return the beginning of the command line: namespaces, and a file system of what is needed.

    Python is at its usual paths, without installed packages, which could hold a benchmark's solutions.

    Raises:
        InputError: There is no bubblewrap.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise InputError(
            "sandbox=bubblewrap, but there is no program bwrap: install it, as with "
            f"{INSTALL}. Where that cannot be, sandbox=unprotected runs the model's code without it, "
            "with your rights to your files; see docs/sandbox.md"
        )
    options = [program, "--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    options += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    options += ["--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for device in ("null", "zero", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for path in _system_folders():
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        else:
            options += ["--ro-bind", str(path), str(path)]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--ro-bind", interpreter(), interpreter()]
    for path in _packages():
        options += ["--tmpfs", str(path), "--remount-ro", str(path)]
    for name in CHILD_FILES:
        options += ["--ro-bind", str(HERE / name), f"/sandbox/{name}"]
    return (*options, "--remount-ro", "/")


def _system_folders() -> list[Path]:
    """Return the folders of shared libraries and of Python's standard library."""
    system = [Path(name) for name in ("/usr/lib", "/usr/lib64", "/lib", "/lib64")]
    # Of the installation below a virtual environment, never of that environment itself.
    prefixes = (Path(sys.base_prefix), Path(sys.base_exec_prefix))
    own = [prefix / name for prefix in prefixes for name in ("lib", "lib64")]
    own.append(Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})))
    if interpreter().startswith("/nix/"):
        own.append(Path("/nix/store"))
    found = [path for path in system if path.exists()]
    for path in own:
        if path.exists() and not any(path.is_relative_to(folder) for folder in found):
            found.append(path)
    return found


def _packages() -> list[Path]:
    """Return the folders of installed packages inside what `_system_folders` shows."""
    places = [folder for folder in _system_folders() if not folder.is_symlink()]
    patterns = [
        f"{above}{name}-packages" for name in ("site", "dist") for above in ("", "python3*/")
    ]
    return [path for folder in places for p in patterns for path in sorted(folder.glob(p))]
