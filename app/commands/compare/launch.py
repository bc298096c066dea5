"""A grid as a Slurm array or as a W&B sweep: the files, whose every task is a comparison of one cell."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from app.commands.compare.cells import Cell
from app.tracking.config_files import PROJECT
from app.utils.errors import InputError
from app.utils.text import rate_text

ARRAY_FILE = "array.sbatch"
SWEEP_FILE = "sweep.yaml"

ARRAY = """#!/usr/bin/env bash
# One cell of the comparison in each task of the array; sbatch options on the command line win over these:
#   sbatch --time 2:00:00 {path}
# Two minutes before the time limit, or when Slurm preempts a task, its run saves and asks to be queued again.
# What is finished is not repeated, so the whole array can be submitted again. When all have ended,
#   python train.py report {folder}
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
set -euo pipefail
cells=(
{cells}
)
read -r method learning_rate seed <<<"${{cells[$SLURM_ARRAY_TASK_ID]}}"
# Slurm runs a copy of this file, so the project is looked for where sbatch was called.
exec srun python "${{PROJECT:-$SLURM_SUBMIT_DIR}}/train.py" compare {options} \\
    --methods "$method" --learning_rates "$learning_rate" --seeds "$seed"
"""


def write_array(folder: Path, cells: Sequence[Cell], options: Sequence[str]) -> Path:
    """Write `array.sbatch`, whose task i trains and tests cell i.

    Args:
        folder: The comparison's folder.
        cells: All cells.
        options: Options of `compare` that all cells share.
    """
    path = folder / ARRAY_FILE
    lines = [f'    "{cell.method} {rate_text(cell.learning_rate)} {cell.seed}"' for cell in cells]
    path.write_text(
        ARRAY.format(
            path=shlex.quote(str(path)),
            folder=shlex.quote(str(folder)),
            output=shlex.quote(f"{folder}/slurm-%A_%a.log"),
            name=shlex.quote(folder.name),
            last=len(cells) - 1,
            cells="\n".join(lines),
            options=shlex.join(options),
        )
    )
    return path


def check_array(config: Mapping[str, Any]) -> None:
    """Refuse a run of several devices, which a task of the array has not."""
    trainer = config["trainer"]
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    if devices not in ("auto", 1, "1", None, [0]) or nodes not in (1, None):
        raise InputError(
            f"trainer.devices is {devices} and trainer.num_nodes {nodes}, but a task of the Slurm array has "
            "one device: leave both alone, or submit each cell with launch/slurm.sbatch"
        )


def write_sweep(
    folder: Path,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    options: Sequence[str],
) -> Path:
    """Write `sweep.yaml` for `wandb sweep`, whose agents train one cell after the other.

    Args:
        folder: The comparison's folder.
        methods: The methods.
        rates: The learning rates.
        seeds: The seeds.
        options: Options of `compare` that all cells share.
    """
    path = folder / SWEEP_FILE
    sweep = {
        "program": "train.py",
        "name": folder.name,
        "method": "grid",
        "metric": {"name": "final/loss", "goal": "minimize"},
        "parameters": {
            "seeds": {"values": list(seeds)},
            "learning_rates": {"values": [rate_text(rate) for rate in rates]},
            "methods": {"values": list(methods)},
        },
        "command": ["${env}", "python", "${program}", "compare", *options, "${args}"],
    }
    head = (
        f"# In {PROJECT.name}/: wandb sweep {shlex.quote(str(path))}, and on each machine that shares the "
        "folder\n#   wandb agent SWEEP_ID\n"
        f"# When all have ended: python train.py report {shlex.quote(str(folder))}\n"
    )
    path.write_text(head + yaml.safe_dump(sweep, sort_keys=False))
    return path


def instructions(path: Path) -> str:
    """Say how to start what a file describes."""
    quoted = shlex.quote(str(path))
    start = f"sbatch {quoted}" if path.name == ARRAY_FILE else f"wandb sweep {quoted}"
    report = f"python train.py report {shlex.quote(str(path.parent))}"
    return f"wrote {path}\nstart: {start}\nafterwards: {report}"
