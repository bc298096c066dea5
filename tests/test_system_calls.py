"""The filter of system calls, run as the kernel runs it, for machines that are not here too."""

import struct

import pytest

from app import system_calls


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_filter_denies_its_table_alone(machine):
    column = list(system_calls.MACHINES).index(machine)
    arch = system_calls.MACHINES[machine]
    denied = {numbers[column] for numbers in system_calls.DENIED.values()} - {None}
    program = system_calls.filter_program(machine)
    found = {nr for nr in range(600) if interpret(program, nr, arch) == 0x50001}
    assert found == denied
    assert {interpret(program, nr, arch) for nr in range(600)} == {0x50001, 0x7FFF0000}
    assert interpret(program, 39, arch ^ 1) == 0x80000000
    assert interpret(program, 0x40000000 + 39, arch) == 0x50001


def interpret(program, number, arch):
    """Run a filter as the kernel does, on the few instructions that it uses."""
    lines = list(struct.iter_unpack("=HBBI", program))
    place = value = 0
    while True:
        code, then, other, k = lines[place]
        place += 1
        if code == 0x20:
            value = {0: number, 4: arch}[k]
        elif code == 0x15:
            place += then if value == k else other
        elif code == 0x35:
            place += then if value >= k else other
        else:
            assert code == 0x06
            return k
