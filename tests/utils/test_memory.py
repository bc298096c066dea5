import mmap
from pathlib import Path

import psutil
import pytest
import torch

from app.utils.memory import PeakMemory

CPU = torch.device("cpu")
MIB = 2**20


def touch(mib):
    """Take pages from the kernel, use them and give them back; malloc might have some left over."""
    with mmap.mmap(-1, mib * MIB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_shows_what_was_freed_meanwhile_and_nothing_earlier(sampled, monkeypatch, tmp_path):
    """By the kernel's mark, and by samples where it cannot be reset."""
    if sampled:
        monkeypatch.setattr(PeakMemory, "_RESET", tmp_path / "none" / "clear_refs")
    elif not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux lets a process reset its mark")
    for earlier, meanwhile, least, most in ((64, 400, 300, 600), (400, 1, 0, 100)):
        touch(earlier)
        before = psutil.Process().memory_info().rss
        with PeakMemory(CPU) as memory:
            touch(meanwhile)
        assert least * MIB <= max(memory.peak_bytes - before, 0) < most * MIB


def test_the_sampler_ends_with_the_context(monkeypatch, tmp_path):
    monkeypatch.setattr(PeakMemory, "_RESET", tmp_path / "none" / "clear_refs")
    with pytest.raises(KeyError), PeakMemory(CPU) as memory:
        raise KeyError
    assert memory.peak_bytes > 0
    assert not memory._sampler.is_alive()
