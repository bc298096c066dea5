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
def test_peak_shows_what_was_freed_meanwhile(sampled, monkeypatch, tmp_path):
    """By the kernel's mark, and by samples where it cannot be reset."""
    if sampled:
        monkeypatch.setattr(PeakMemory, "_RESET", tmp_path / "none" / "clear_refs")
    elif not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux lets a process reset its mark")
    touch(64)
    before = psutil.Process().memory_info().rss
    with PeakMemory(CPU) as memory:
        touch(400)
    assert 300 * MIB < memory.peak_bytes - before < 600 * MIB


@pytest.mark.parametrize("sampled", [False, True])
def test_an_earlier_peak_is_forgotten(sampled, monkeypatch, tmp_path):
    if sampled:
        monkeypatch.setattr(PeakMemory, "_RESET", tmp_path / "none" / "clear_refs")
    elif not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux lets a process reset its mark")
    touch(400)
    before = psutil.Process().memory_info().rss
    with PeakMemory(CPU) as memory:
        touch(1)
    assert memory.peak_bytes - before < 100 * MIB


def test_the_sampler_ends_with_the_context(monkeypatch, tmp_path):
    monkeypatch.setattr(PeakMemory, "_RESET", tmp_path / "none" / "clear_refs")
    with pytest.raises(KeyError), PeakMemory(CPU) as memory:
        raise KeyError
    assert memory.peak_bytes > 0
    assert not memory._sampler.is_alive()
