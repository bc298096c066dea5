"""The filter of system calls, run as the kernel runs it, for machines that are not here too."""

import struct

import pytest

from app.evaluation.sandbox import seccomp as system_calls

ALLOW, REFUSE, LACK, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000  # EPERM, ENOSYS


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_filter_denies_its_table_alone(machine):
    column = list(system_calls.MACHINES).index(machine)
    arch = system_calls.MACHINES[machine]
    denied = {numbers[column] for numbers in system_calls.DENIED.values()} - {None}
    program = system_calls.filter_program(machine)
    known = range(system_calls.FIRST_UNKNOWN)
    answers = {number: interpret(program, number, arch) for number in known}
    assert {number for number, answer in answers.items() if answer == REFUSE} == denied
    assert set(answers.values()) == {ALLOW, REFUSE}
    for number in (system_calls.FIRST_UNKNOWN, 600, 0x3FFFFFFF):
        assert interpret(program, number, arch) == LACK
    assert interpret(program, 39, arch ^ 1) == KILL
    for number in (0x40000000 + 39, 0xFFFFFFFF):
        assert interpret(program, number, arch) == REFUSE


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_filter_denies_commands(machine):
    column = list(system_calls.MACHINES).index(machine)
    arch = system_calls.MACHINES[machine]
    program = system_calls.filter_program(machine)
    for *numbers, denied in system_calls.DENIED_COMMANDS.values():
        # F_GETFL, F_SETFL, F_GETOWN, TCGETS, FIONREAD and FIOGETOWN stay.
        for command in (0, 3, 4, 9, 0x5401, 0x541B, 0x8903, *denied):
            answer = interpret(program, numbers[column], arch, command)
            assert answer == (REFUSE if command in denied else ALLOW)


def interpret(program, number, arch, command=0):
    """Run a filter as the kernel does, on the few instructions that it uses."""
    lines = list(struct.iter_unpack("=HBBI", program))
    place = value = 0
    while True:
        code, then, other, k = lines[place]
        place += 1
        if code == 0x20:
            value = {0: number, 4: arch, 24: command}[k]
        elif code == 0x15:
            place += then if value == k else other
        elif code == 0x35:
            place += then if value >= k else other
        else:
            assert code == 0x06
            return k
