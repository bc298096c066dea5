"""Give up, for good, what a program under test has no use for: capabilities, and system calls.

The filter is seccomp's: a few lines of the kernel's classic BPF, after which the calls below fail with
EPERM and all others work. Whatever needs a capability (mounts, modules, clocks, other users) fails without
being listed. This file runs inside the sandbox: it imports the standard library alone.
"""

import ctypes
import os
import signal
import struct

# Numbers on x86_64 and on aarch64, from the kernel's tables; None where a machine has no such call.
DENIED: dict[str, tuple[int, int | None]] = {
    # Another process or thread, another program: there is one of each.
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    # Signals, also to itself.
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    # The network, and the calls that io_uring would make unseen.
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Other processes' memory.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    # Memory that outlives a process, or that RLIMIT_AS does not count.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Limits, session, and what was set up before.
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "personality": (135, 92),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    # Parts of the kernel with a history of holes.
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
}
MACHINES = {
    "x86_64": 0xC000003E,
    "aarch64": 0xC00000B7,
}  # their names in the filter's data (AUDIT_ARCH_*)
_X32 = 0x40000000  # x86_64 calls of another numbering

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # the last: EPERM

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_FILTER = 2
_CAPABILITIES_V3 = 0x20080522


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_program(machine: str) -> bytes:
    """Return the filter for a machine, eight bytes an instruction.

    Args:
        machine: A key of `MACHINES`, as `os.uname` names it.
    """
    column = list(MACHINES).index(machine)
    numbers = [numbers[column] for numbers in DENIED.values() if numbers[column] is not None]
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, MACHINES[machine]),
        (_RETURN, 0, 0, _KILL),  # calls of another machine, such as those of 32 bits
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, len(numbers) + 1, 0, _X32),
        # The jump leads over the numbers that are left and over the line that allows.
        *((_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def give_up_privileges() -> None:
    """Drop all capabilities and deny the calls of `DENIED` to this process; there is no way back.

    Raises:
        OSError: The kernel refuses, or the machine has another processor.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no table of system calls for {machine}: expected {' or '.join(MACHINES)}")
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    _must(libc.capset(header, bytes(24)), "capset")
    _must(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    lines = filter_program(machine)
    program = _Program(len(lines) // 8, lines)
    _must(libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0), "seccomp")


def die_with_parent() -> None:
    """Let the kernel kill this process as soon as its parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    _must(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def hide_from_same_user() -> None:
    """Close this process's memory and open files to processes of the same user, as under /proc."""
    libc = ctypes.CDLL(None, use_errno=True)
    _must(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def _must(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
