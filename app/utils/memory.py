"""Peak memory of a stretch of code: allocated on an accelerator, resident on the CPU."""

import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch


class PeakMemory:
    """Measure the peak while the context lasts; `peak_bytes` is that so far, and stays as it is afterwards.

    On CUDA this is the allocator's peak. On the CPU it is the kernel's high-water mark of the process's
    resident memory, which Linux lets a process reset; elsewhere a thread samples it every 10 ms.
    """

    _STATUS = Path("/proc/self/status")
    _RESET = Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        try:
            self._RESET.write_text("5")
        except OSError:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
        self._read()

    @property
    def peak_bytes(self) -> int:
        """The peak so far, or of the whole context once that has ended."""
        if not self._stop.is_set():
            self._read()
        return self._peak_bytes

    def _read(self) -> None:
        if self.device.type == "cuda":
            self._peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is None:
            lines = self._STATUS.read_text().splitlines()
            high = next(line for line in lines if line.startswith("VmHWM"))
            self._peak_bytes = int(high.split()[1]) * 1024

    def _sample(self) -> None:
        process = psutil.Process()
        stopped = False
        while not stopped:  # at least once, however short the stretch
            self._peak_bytes = max(self._peak_bytes, process.memory_info().rss)
            stopped = self._stop.wait(0.01)
