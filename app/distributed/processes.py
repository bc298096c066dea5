"""How many processes the run has, and which one this is; a command that needs no torch does not import it."""

import os
import sys
from typing import Any


def process_group() -> Any:
    """Return torch.distributed where there is a process group, else None."""
    dist = sys.modules.get("torch.distributed")  # without it, nobody can have made one
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def world_size() -> int:
    """Return the number of processes."""
    group = process_group()
    return 1 if group is None else group.get_world_size()


def global_rank() -> int:
    """Return this process's number, 0 to world_size - 1."""
    group = process_group()
    return 0 if group is None else group.get_rank()


def is_first_process() -> bool:
    """Return whether this is the first process of the run, also before there is a process group.

    Launchers say so in the environment: torchrun by RANK, Slurm by SLURM_PROCID, Lightning by NODE_RANK
    and LOCAL_RANK.
    """
    if process_group() is not None:
        return global_rank() == 0
    for names in (("RANK",), ("NODE_RANK", "LOCAL_RANK"), ("SLURM_PROCID",)):
        numbers = [int(os.environ[name]) for name in names if name in os.environ]
        if numbers:
            return not any(numbers)
    return True
