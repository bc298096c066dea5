"""`python train.py export`: a run's merged model, or its adapter elsewhere."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from transformers.utils import logging as transformers_logging

from app.models.adapter_io import load_adapter, merge_adapter, save_model
from app.models.loading import load_model, load_tokenizer, model_fingerprint
from app.models.source import resolve_model
from app.tracking.model_card import write_run_card
from app.tracking.run_folder import RunFolder
from app.utils.command_parser import CommandParser
from app.utils.errors import InputError
from app.utils.files import atomic_folder


def export_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of `export` and run it."""
    parser = CommandParser("export", "Write a run's adapter or merged model.")
    add = parser.add_argument
    add("--run", required=True, type=Path, help="folder of a finished run")
    add("--merge", action="store_true", help="write the base model with the adapter merged into it")
    add("--output", type=Path, help="folder to write; default RUN/merged or RUN/exported_adapter")
    given = parser.parse_args(arguments)
    target = given.output or given.run / ("merged" if given.merge else "exported_adapter")
    export(RunFolder(given.run), given.merge, target)
    print(f"wrote {target}")
    return 0


def export(folder: RunFolder, merge: bool, target: Path) -> None:
    """Write a run's adapter (PEFT layout) or merged model (safetensors) for use elsewhere.

    Raises:
        InputError: It is no finished run, the target exists, or the base model has changed.
    """
    folder.check_finished()
    if target.exists():
        expected = "remove it or name another folder"
        raise InputError(f"--output is {str(target)!r}, which exists: {expected}")
    whole = folder.model.is_dir()
    if whole and not merge:
        raise InputError(
            f"--run is {str(folder)!r}, which trained the whole model and has no adapter: give --merge, which "
            "writes the model"
        )
    if whole or not merge:
        with atomic_folder(target) as part:
            shutil.copytree(folder.model if whole else folder.adapter, part, dirs_exist_ok=True)
            write_run_card(folder, part)
        return
    settings = yaml.safe_load(folder.config.read_text())["model"]
    summary = json.loads(folder.summary.read_text())
    source = resolve_model(settings["name"])
    fingerprint, expected = model_fingerprint(source), summary["model"]["fingerprint"]
    if fingerprint != expected:
        raise InputError(
            f"the base model {source.name} has fingerprint {fingerprint}, but the run was trained on "
            f"{expected}: the weights behind model.name have changed"
        )
    transformers_logging.disable_progress_bar()
    base = load_model(source, getattr(torch, settings["dtype"]))
    trained = load_adapter(base, folder.adapter, trainable=False)
    with atomic_folder(target) as part:
        save_model(merge_adapter(trained), load_tokenizer(source), part)
        write_run_card(folder, part)
