"""Give up, for good, what a program under test has no use for: capabilities, and system calls.

The filter is classic BPF of seccomp: the calls below fail with EPERM, those that are newer than this table with
ENOSYS, and all others work. Whatever needs a capability (mounts, modules, clocks, other users) fails without
being listed. Run inside the sandbox: imports the standard library alone.
"""

import ctypes
import os
import re
import signal
import struct

CALLS = """
# Another process or thread, another program: there is one of each.
fork 57 -                  vfork 58 -                 clone 56 220               clone3 435 435
execve 59 221              execveat 322 281
# Signals, also to itself.
kill 62 129                tkill 200 130              tgkill 234 131             rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240  pidfd_open 434 434         pidfd_getfd 438 438        pidfd_send_signal 424 424
# The network, and the calls that io_uring would make unseen.
socket 41 198              io_uring_setup 425 425     io_uring_enter 426 426     io_uring_register 427 427
# Other processes' memory.
ptrace 101 117             process_vm_readv 310 270   process_vm_writev 311 271  process_madvise 440 440
kcmp 312 272
# Other processes' share of the machine.
setpriority 141 140        ioprio_set 251 30          sched_setparam 142 118     sched_setscheduler 144 119
sched_setaffinity 203 122  sched_setattr 314 274      migrate_pages 256 238      move_pages 279 239
# What is written of every file, which the kernel finishes even when the caller is killed.
sync 162 81                syncfs 306 267
# Memory that outlives a process, or that RLIMIT_AS does not count; and that of other processes, whose
# numbers are small and can be guessed.
shmget 29 194              shmat 30 196               shmctl 31 195              msgget 68 186
msgsnd 69 189              msgrcv 70 188              msgctl 71 187              semget 64 190
semop 65 193               semtimedop 220 192         semctl 66 191              mq_open 240 180
mq_unlink 241 181          io_setup 206 0             memfd_create 319 279       memfd_secret 447 447
add_key 248 217            request_key 249 218        keyctl 250 219
# Owner, mode, times and attributes of a file. bubblewrap gives /dev/null and its like as the machine's
# own, writable ones, and to a root without capabilities they still belong.
chmod 90 -                 fchmod 91 52               fchmodat 268 53            fchmodat2 452 452
chown 92 -                 lchown 94 -                fchown 93 55               fchownat 260 54
utime 132 -                utimes 235 -               futimesat 261 -            utimensat 280 88
setxattr 188 5             lsetxattr 189 6            fsetxattr 190 7            setxattrat 463 463
removexattr 197 14         lremovexattr 198 15        fremovexattr 199 16        removexattrat 466 466
file_setattr 469 469
# Limits, session, and what was set up before.
prctl 157 167              prlimit64 302 261          setrlimit 160 164          setsid 112 157
setpgid 109 154            personality 135 92         unshare 272 97             setns 308 268
mount 165 40
# Parts of the kernel with a history of holes.
bpf 321 280                userfaultfd 323 282        perf_event_open 298 241    modify_ldt 154 -
fanotify_init 300 262      syslog 103 116
"""
"""Each with its number on x86_64 and on aarch64, from the kernel's tables; "-" where there is no such call."""
_WORDS = re.sub("#.*", "", CALLS).split()
DENIED = {
    name: tuple(None if number == "-" else int(number) for number in numbers)
    for name, *numbers in zip(_WORDS[::3], _WORDS[1::3], _WORDS[2::3], strict=True)
}
# Commands, the second argument, that make another process the one that is sent a signal when a pipe or
# socket can be read: it need not be SIGIO.
DENIED_COMMANDS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "fcntl": (72, 25, (8, 15)),  # F_SETOWN, F_SETOWN_EX
    "ioctl": (16, 29, (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP
}
FIRST_UNKNOWN = 470  # on both machines; the calls before it were gone through for this table
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Their names in the filter's data (AUDIT_ARCH_*)."""
_X32 = 0x40000000  # x86_64 calls of another numbering

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_DENY, _LACK = 0x00050001, 0x00050026  # EPERM, ENOSYS
# Places in the filter's data; the last: the low half of the second argument.
_NUMBER, _MACHINE, _COMMAND = 0, 4, 24

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_FILTER = 2
_CAPABILITIES_V3 = 0x20080522


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_program(machine: str) -> bytes:
    """Return the filter for a machine of `MACHINES`, eight bytes an instruction."""
    column = list(MACHINES).index(machine)
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, MACHINES[machine]),
        (_RETURN, 0, 0, _KILL),  # calls of another machine, such as those of 32 bits
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _DENY),
        (_AT_LEAST, 0, 1, FIRST_UNKNOWN),
        (_RETURN, 0, 0, _LACK),
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _DENY)]
    for *both, commands in DENIED_COMMANDS.values():
        denials = [x for c in commands for x in ((_EQUAL, 0, 1, c), (_RETURN, 0, 0, _DENY))]
        lines += [(_EQUAL, 0, len(denials) + 2, both[column]), (_LOAD, 0, 0, _COMMAND)]
        lines += [*denials, (_RETURN, 0, 0, _ALLOW)]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def give_up_privileges() -> None:
    """Drop all capabilities and deny the calls of `DENIED` to this process; there is no way back.

    Raises:
        OSError: The kernel denies it, or the machine has another processor.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no table of system calls for {machine}: expected {' or '.join(MACHINES)}")
    _call("capset", struct.pack("=Ii", _CAPABILITIES_V3, 0), bytes(24))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    lines = filter_program(machine)
    program = _Program(len(lines) // 8, lines)
    _call("prctl", _PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)


def die_with_parent() -> None:
    """Let the kernel kill this process as soon as its parent is gone."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def hide_from_same_user() -> None:
    """Close this process's memory and open files to processes of the same user, as under /proc."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def _call(name: str, *arguments: object) -> None:
    """Make a call of the C library that returns 0 unless it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}({arguments[0]!r}, ...): {os.strerror(code)}")
