"""One process needs no collective; launchers say in the environment which process is the first."""

import pytest
import torch

from app.distributed.collectives import (
    any_rank,
    broadcast,
    from_first_process,
    gather_numbers,
    is_first_process,
    largest_over_processes,
    raise_on_all_ranks,
    sum_in_one_buffer,
    sum_over_processes,
)

CPU = torch.device("cpu")


def test_one_process_alone():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert sum_over_processes(tensor.clone()).equal(tensor)
    assert broadcast(tensor.T).equal(tensor.T)
    kept = tensor.clone()
    sum_in_one_buffer([kept])
    assert kept.equal(tensor)
    assert gather_numbers(7, CPU) == [7]
    assert largest_over_processes(-3, CPU) == -3
    assert [any_rank(flag, CPU) for flag in (True, False)] == [True, False]
    assert from_first_process(lambda: 5) == 5
    with pytest.raises(OSError, match="full"):
        raise_on_all_ranks(lambda: (_ for _ in ()).throw(OSError("full")))


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun, second node
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),  # Lightning's own launcher
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_process_before_there_is_a_process_group(variables, first, monkeypatch):
    for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first
