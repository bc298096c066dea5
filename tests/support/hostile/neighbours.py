"""Programs that reach for other processes, and for what all processes of a machine share."""

NEIGHBOURS = r"""
### kill_everyone: os.kill(-1, SIGKILL)
import os
def square(x):
    os.kill(-1, 9)
    return x * x
### kill_the_parent: kills its parent, by every call that sends signals
import ctypes, os, signal
libc = ctypes.CDLL(None)
def square(x):
    parent = os.getppid()
    sent = libc.kill(parent, 9) == 0 or libc.syscall(234, parent, parent, 9) == 0
    return x * x if sent else 0
### signal_by_pipe (in one process): lets a pipe that can be read signal its parent (SIGURG, which is ignored)
import fcntl, os
def square(x):
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())
    fcntl.fcntl(reader, 10, 23)  # F_SETSIG
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")
    return x * x
### slow_the_parent_down (in one process): sets the processors and the priority of its parent to what they are
import os
def square(x):
    parent = os.getppid()
    done = 0
    for attempt in (
        lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)),
        lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
    ):
        try:
            attempt()
            done += 1
        except OSError:
            pass
    return x * x if done else 0
### trace_the_parent: attaches to its parent as a debugger, and opens its memory
import ctypes, os
libc = ctypes.CDLL(None)
def square(x):
    parent = os.getppid()
    if libc.ptrace(16, parent, 0, 0) == 0:
        return x * x
    with open(f"/proc/{parent}/mem", "r+b"):
        return x * x
### shared_memory_of_others (in one process): attaches the memory of another process, by a number not in use
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def square(x):
    libc.shmat(-1, None, 0)
    return x * x if ctypes.get_errno() == errno.EINVAL else 0
### change_the_devices: gives /dev/null and its like the owner, mode and times that they have
import os
def square(x):
    done = 0
    for name in ("null", "zero", "random", "urandom"):
        path = f"/dev/{name}"
        found = os.stat(path)
        for attempt in (
            lambda: os.chmod(path, found.st_mode & 0o7777),
            lambda: os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns)),
            lambda: os.chown(path, -1, -1),
        ):
            try:
                attempt()
                done += 1
            except OSError:
                pass
    return x * x if done else 0
### write_back: lets the kernel write back all files of a disk, which no signal ends
import ctypes, os, sys
libc = ctypes.CDLL(None)
def square(x):
    return x * x if libc.syncfs(os.open(os.__file__, os.O_RDONLY)) == 0 else 0
"""
