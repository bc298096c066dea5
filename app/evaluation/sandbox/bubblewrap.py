"""Command lines of the two sandboxes (docs/sandbox.md says what each keeps out, and what it was tried with).

`bubblewrap` puts the program into namespaces of its own; `unprotected` runs it with the rights of the user. In
both, child.py sets limits and seccomp.py denies system calls.
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
TEMPORARY_BYTES = 16 * 2**20
LIMITS = {
    "RLIMIT_AS": 2**30,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_NPROC": 1,
    "RLIMIT_CORE": 0,
    "RLIMIT_MEMLOCK": 0,
}
"""Of the program's process, by their names in the resource module: bytes, or numbers."""


def sandbox_command(mode: SandboxMode, timeout: float) -> list[str]:
    """Return the command line that starts `child.py` in its sandbox.

    The judge keeps the timeout, which is the wall time of program and tests together in seconds; the program
    may use two seconds more of CPU time.

    Raises:
        InputError: There is no bubblewrap.
    """
    own = {"RLIMIT_CPU": int(timeout) + 2, "RLIMIT_FSIZE": TEMPORARY_BYTES}
    limits = json.dumps({**LIMITS, **own})
    python = [interpreter(), "-I", "-S", "-B"]
    if mode == "unprotected":
        return [*python, str(HERE / "child.py"), limits]
    return [*bubblewrap_options(), "--", *python, "/sandbox/child.py", limits]


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
            "sandbox=bubblewrap, but there is no program bwrap: install it, as with apt-get install "
            "bubblewrap (dnf install bubblewrap, pacman -S bubblewrap). Where that cannot be, "
            "sandbox=unprotected runs the model's code without it, with your rights to your files; see "
            "docs/sandbox.md"
        )
    options = [program, "--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    options += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    options += ["--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for device in ("null", "zero", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    folders = _system_folders()
    for path in folders:
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        else:
            options += ["--ro-bind", str(path), str(path)]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--ro-bind", interpreter(), interpreter()]
    names = [f"{above}{kind}-packages" for kind in ("site", "dist") for above in ("", "python3*/")]
    real = [folder for folder in folders if not folder.is_symlink()]
    for path in [path for folder in real for name in names for path in sorted(folder.glob(name))]:
        options += ["--tmpfs", str(path), "--remount-ro", str(path)]
    for name in CHILD_FILES:
        options += ["--ro-bind", str(HERE / name), f"/sandbox/{name}"]
    return (*options, "--remount-ro", "/")


def _system_folders() -> list[Path]:
    """Return the folders of shared libraries and of Python's standard library."""
    folders = [Path(name) for name in ("/usr/lib", "/usr/lib64", "/lib", "/lib64")]
    folders = [folder for folder in folders if folder.exists()]
    # Of the installation below a virtual environment, never of that environment itself.
    prefixes = (Path(sys.base_prefix), Path(sys.base_exec_prefix))
    own = [prefix / name for prefix in prefixes for name in ("lib", "lib64")]
    own.append(Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})))
    if interpreter().startswith("/nix/"):
        own.append(Path("/nix/store"))
    for path in own:
        if path.exists() and not any(path.is_relative_to(folder) for folder in folders):
            folders.append(path)
    return folders
