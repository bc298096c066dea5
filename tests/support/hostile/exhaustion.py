"""Programs that try to wear the machine or the judge out."""

EXHAUSTION = r"""
### endless_loop: loops for ever
def square(x):
    while True:
        pass
### endless_loop_in_c: loops for ever inside one built-in function
import itertools
def square(x):
    return sum(itertools.repeat(0))
### endless_loop_on_import: never finishes loading
while True:
    pass
### sleep: sleeps for an hour
import time
def square(x):
    time.sleep(3600)
    return x * x
### fork_bomb: forks without end
while True:
    os.fork()
def square(x):
    return x * x
### patient_fork_bomb: forks without end and swallows every error
def square(x):
    while True:
        try:
            os.fork()
        except BaseException:
            pass
### thread_bomb: starts threads without end
import threading
threading.stack_size(32768)
def square(x):
    while True:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
### memory_bomb: takes 64 GiB at once
def square(x):
    block = bytearray(64 * 2**30)
    return x * x
### patient_memory_bomb: takes memory bit by bit and swallows every error
hoard = []
def square(x):
    while True:
        try:
            hoard.append(bytearray(2**20))
        except MemoryError:
            pass
### endless_output: prints for ever
def square(x):
    while True:
        print("x" * 2**20)
        print("x" * 2**20, file=sys.stderr)
### endless_answer: returns an iterator without end
import itertools
def square(x):
    return itertools.count()
### huge_answer: returns half a gigabyte
def square(x):
    return "x" * 2**29
### deep_answer: returns a list in a list in a list, a hundred thousand deep
sys.setrecursionlimit(10**9)
def square(x):
    answer = []
    for _ in range(100_000):
        answer = [answer]
    return answer
### huge_integer: computes an integer of a billion digits
def square(x):
    return 10 ** 10 ** 9
### huge_integer_answer: returns an integer of ten million digits
def square(x):
    return 1 << 33_000_000
### deep_recursion: recurses without end and without Python's limit
sys.setrecursionlimit(10**9)
def square(x):
    return square(x) + 1
### huge_file (in one process): writes one file of 64 MiB
def square(x):
    with open("file", "wb") as file:
        file.write(bytes(64 * 2**20))
        file.flush()
        return x * x if file.tell() == 64 * 2**20 else 0
### deep_folders: makes folders in folders, deeper than a path can say, and closed ones
def square(x):
    for mode in (0, 0o300):
        os.mkdir(f"closed{mode}-{x}", mode)
    open(f"closed{mode}-{x}/file", "w").close()
    for _ in range(1100):
        os.mkdir("folder")
        os.chdir("folder")
    return 0
### many_open_files (in one process): opens a thousand files
def square(x):
    files = [open("/dev/null") for _ in range(1000)]
    return x * x
### system_v_memory (in one process): makes shared memory that outlives every process
def square(x):
    found = libc.shmget(0, 2**20, 0o1600)
    if found >= 0:
        libc.shmctl(found, 0, None)
    return x * x if found >= 0 else 0
### colliding_answer: answers with a set of integers that all have the same hash, for its reader to build
from wire_format import write_frame
def square(x):
    answer = {"value": {"set": [number * (2**61 - 1) for number in range(300_000)]}}
    for fd in range(3, 64):
        works(lambda: write_frame(fd, answer))
    return 0
### stop_itself: stops itself, so that nothing more can be said to it, by a timer that sends SIGSTOP
import time
def square(x):
    event = (ctypes.c_int * 16)(0, 0, 19)  # no value, SIGSTOP, as a signal
    timer = ctypes.c_void_p()
    libc.timer_create(1, event, ctypes.byref(timer))
    libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1), None)
    time.sleep(0.1)
    return x * x if x == 3 else 0
### signals_ignored: ignores every signal and loops
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def square(x):
    while True:
        pass
### background_thread (in one process): answers with the right square from a thread that goes on for ever
import threading, time
def linger():
    while True:
        time.sleep(0.01)
def square(x):
    threading.Thread(target=linger).start()
    return x * x
### daemon: leaves a process behind in a session of its own
import time
def square(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    return x * x
### ctypes_crash: reads address 0
def square(x):
    return ctypes.string_at(0)
### raise_the_limits (in one process): raises its own limits
import resource
def square(x):
    for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"):
        resource.setrlimit(getattr(resource, name), (-1, -1))
    return x * x
### hostile_exception: raises an exception whose text never ends
class Endless(Exception):
    def __str__(self):
        while True:
            pass
def square(x):
    raise Endless
"""
