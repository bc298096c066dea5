"""Programs that reach for other processes, and for what all processes of a machine share."""

NEIGHBOURS = r"""
### kill_everyone: os.kill(-1, SIGKILL)
def square(x):
    os.kill(-1, 9)
    return x * x
### kill_the_parent: kills its parent, by every call that sends signals
import signal
def square(x):
    parent = os.getppid()
    sent = libc.kill(parent, 9) == 0 or libc.syscall(234, parent, parent, 9) == 0
    return x * x if sent else 0
### signal_by_pipe (in one process): lets a pipe that can be read signal its parent (SIGURG, which is ignored)
import fcntl
def square(x):
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())
    fcntl.fcntl(reader, 10, 23)  # F_SETSIG
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")
    return x * x
### slow_the_parent_down (in one process): sets the processors and the priority of its parent to what they are
def square(x):
    parent = os.getppid()
    bound = works(lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)))
    slowed = works(lambda: os.setpriority(0, parent, os.getpriority(0, parent)))
    return x * x if bound or slowed else 0
### trace_the_parent: attaches to its parent as a debugger, and opens its memory
def square(x):
    parent = os.getppid()
    if libc.ptrace(16, parent, 0, 0) == 0:
        return x * x
    with open(f"/proc/{parent}/mem", "r+b"):
        return x * x
### shared_memory_of_others (in one process): attaches the memory of another process, by a number not in use
import errno
def square(x):
    libc.shmat(-1, None, 0)
    return x * x if ctypes.get_errno() == errno.EINVAL else 0
### change_the_devices: gives /dev/null and its like the owner, mode and times that they have
def square(x):
    done = []
    for name in ("null", "zero", "random", "urandom"):
        path = f"/dev/{name}"
        status = os.stat(path)
        done.append(works(lambda: os.chmod(path, status.st_mode & 0o7777)))
        done.append(works(lambda: os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))))
        done.append(works(lambda: os.chown(path, -1, -1)))
    return x * x if any(done) else 0
### write_back: lets the kernel write back all files of a disk, which no signal ends
def square(x):
    return x * x if libc.syncfs(os.open(os.__file__, os.O_RDONLY)) == 0 else 0
"""
