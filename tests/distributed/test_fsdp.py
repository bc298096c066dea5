"""Which blocks are sharded, and over which backend; tests/multiprocess/test_parity.py trains with it."""

import pytest
import torch

from app.distributed.fsdp import Fsdp2Strategy, blocks


@pytest.mark.parametrize(("build", "count"), [("tiny_llama", 2), ("tiny_gpt2", 2), ("tiny_t5", 4)])
def test_blocks_are_those_of_the_outermost_lists(build, count, request):
    model = request.getfixturevalue(build)()
    members = list(blocks(model))
    assert len(members) == count
    assert len({type(member) for member in members}) == 1


@pytest.mark.parametrize(
    ("given", "offload", "cuda", "backend"),
    [
        (None, True, True, "cpu:gloo,cuda:nccl"),
        (None, False, True, None),
        (None, True, False, None),
        ("gloo", True, True, "gloo"),
    ],
)
def test_offloaded_weights_are_sent_by_gloo(given, offload, cuda, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    strategy = Fsdp2Strategy(cpu_offload=offload, process_group_backend=given)
    assert strategy.process_group_backend == backend
