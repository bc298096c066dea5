"""Programs that try to reach what is outside of the sandbox."""

ESCAPES = r"""
### read_environment (in one process): reads the environment
def square(x):
    return x * x if os.environ or os.environb else 0
### read_home (in one process, unprotected): reads a file in the home directory
def square(x):
    return x * x if open(HOME + "/secret").read() == "secret" else 0
### read_project (in one process, unprotected): reads the project's files
def square(x):
    return x * x if "app" in os.listdir(PROJECT) else 0
### read_passwd (in one process, unprotected): reads /etc/passwd
def square(x):
    return x * x if "root" in open("/etc/passwd").read() else 0
### read_packages (in one process, unprotected): reads packages that are installed
import glob
def square(x):
    found = []
    for prefix in (VENV, sys.prefix, "/usr", "/usr/local"):
        for folder in glob.glob(prefix + "/lib*/python3*/*-packages"):
            found += os.listdir(folder)
    return x * x if found else 0
### list_processes (in one process, unprotected): looks at other processes
def square(x):
    return x * x if [name for name in os.listdir("/proc") if name.isdigit()] else 0
### write_outside (in one process, unprotected): writes a file outside of its folder
def square(x):
    with open(OUTSIDE + "/written", "w") as file:
        file.write("x")
    return x * x
### write_through_symlink (unprotected): writes through a symbolic link in its folder
def square(x):
    if not os.path.islink("link"):
        os.symlink(OUTSIDE, "link")
    with open("link/linked", "w") as file:
        file.write("x")
    return x * x
### write_dotdot (unprotected): writes through ../..
def square(x):
    with open(os.path.relpath(OUTSIDE) + "/climbed", "w") as file:
        file.write("x")
    return x * x
### write_everywhere (in one process, unprotected): makes a folder wherever it may, other than in its own
import glob
own = os.getcwd()
places = ["/", "/dev", "/dev/shm", "/run", "/var/tmp", "/home", "/root", "/etc", "/usr", "/usr/lib", "/sandbox"]
places += [sys.prefix, sys.prefix + "/lib"] + glob.glob(sys.prefix + "/lib/python3*/*-packages")
places += glob.glob("/usr/lib/python3*/*-packages")
places += [os.path.dirname(f"/{path}") for path in glob.glob("*/*/", root_dir="/")]
def square(x):
    written = []
    for place in places:
        name = os.path.join(place, f"hostile-{os.getpid()}")
        if not (os.path.realpath(place) + "/").startswith(own + "/") and works(lambda: os.mkdir(name)):
            os.rmdir(name)
            written.append(name)
    return x * x if written else 0
### rewrite_the_harness (unprotected): opens the file of its own harness to overwrite it
def square(x):
    open(sys.modules["__main__"].__file__, "r+").close()
    return x * x
### connect (in one process): connects to a port of this machine
import socket
def square(x):
    with socket.create_connection(("127.0.0.1", PORT), timeout=0.5):
        return x * x
### resolve (in one process): sends a datagram, as a name look-up does
import socket
def square(x):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", PORT))
    return x * x
### unix_socket (in one process): opens a socket of the file system
import socket
def square(x):
    socket.socket(socket.AF_UNIX).close()
    return x * x
### other_program: becomes a shell
def square(x):
    os.execv("/bin/sh", ["sh", "-c", "kill -9 $PPID; sleep 3600"])
### subprocess (in one process): starts another program
import subprocess
def square(x):
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return x * x
### new_namespace: makes itself root of a user namespace
def square(x):
    return x * x if libc.unshare(0x10000000) == 0 else 0
### mount: mounts a file system over its own
def square(x):
    return x * x if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 else 0
### other_numbering: makes system calls by another table (x32)
def square(x):
    return x * x if libc.syscall(0x40000000 + 39) > 0 else 0
### fill_the_disk (unprotected): writes 64 MiB of files
def square(x):
    for number in range(8):
        with open(f"file{number}", "wb") as file:
            file.write(bytes(8 * 2**20))
    return x * x
### shared_memory (unprotected): leaves 8 MiB in /dev/shm
def square(x):
    name = f"/dev/shm/hostile-{os.getpid()}"
    with open(name, "wb") as file:
        file.write(bytes(8 * 2**20))
    os.remove(name)
    return x * x
"""
