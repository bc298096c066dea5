"""What tests that start processes share."""

import os
import sys
from pathlib import Path


def environment(**own: str) -> dict[str, str]:
    """Return this environment with its Python first, and one thread a process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **own}
