"""Write a grid as a Slurm array or as a W&B sweep, whose every task is a comparison of one cell."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from app.commands.compare.cells import Cell
from app.tracking.config_files import PROJECT
from app.utils.errors import InputError
from app.utils.text import rate_text

ARRAY_FILE = "array.sbatch"
SWEEP_FILE = "sweep.yaml"


def write_launch_file(
    launcher: str, folder: Path, cells: Sequence[Cell], options: Sequence[str]
) -> str:
    """Write `array.sbatch`, whose task i trains and tests cell i, or `sweep.yaml` for agents of W&B.

    The options of `compare` are those that all cells share.

    Returns:
        How to start what was written.
    """
    if launcher == "slurm":
        path, start = folder / ARRAY_FILE, "sbatch"
        path.write_text(_array(path, cells, options))
    else:
        path, start = folder / SWEEP_FILE, "wandb sweep"
        path.write_text(_sweep(path, cells, options))
    report = f"python train.py report {shlex.quote(str(folder))}"
    return f"wrote {path}\nstart: {start} {shlex.quote(str(path))}\nafterwards: {report}"


def check_array(config: Mapping[str, Any]) -> None:
    """Refuse a run of several devices, which a task of the array has not."""
    trainer = config["trainer"]
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    if devices not in ("auto", 1, "1", None, [0]) or nodes not in (1, None):
        raise InputError(
            f"trainer.devices is {devices} and trainer.num_nodes {nodes}, but a task of the Slurm array has "
            "one device: leave both alone, or submit each cell with launch/slurm.sbatch"
        )


def _array(path: Path, cells: Sequence[Cell], options: Sequence[str]) -> str:
    environment = Environment(  # for a shell, whose values are quoted here
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["rate_text"] = rate_text
    return environment.get_template(f"{ARRAY_FILE}.j2").render(
        path=shlex.quote(str(path)),
        folder=shlex.quote(str(path.parent)),
        output=shlex.quote(f"{path.parent}/slurm-%A_%a.log"),
        name=shlex.quote(path.parent.name),
        cells=cells,
        options=shlex.join(options),
    )


def _sweep(path: Path, cells: Sequence[Cell], options: Sequence[str]) -> str:
    grid: dict[str, list[Any]] = {
        "seeds": [cell.seed for cell in cells],
        "learning_rates": [rate_text(cell.learning_rate) for cell in cells],
        "ranks": [cell.rank for cell in cells if cell.rank is not None],
        "methods": [cell.method for cell in cells],
    }
    sweep = {
        "program": "train.py",
        "name": path.parent.name,
        "method": "grid",
        "metric": {"name": "final/loss", "goal": "minimize"},
        "parameters": {
            name: {"values": list(dict.fromkeys(values))} for name, values in grid.items() if values
        },
        "command": ["${env}", "python", "${program}", "compare", *options, "${args}"],
    }
    head = (
        f"# In {PROJECT.name}/: wandb sweep {shlex.quote(str(path))}, and on each machine that shares the "
        "folder\n#   wandb agent SWEEP_ID\n"
        f"# When all have ended: python train.py report {shlex.quote(str(path.parent))}\n"
    )
    return head + yaml.safe_dump(sweep, sort_keys=False)
