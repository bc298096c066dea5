"""`python train.py export`: a run's merged model, or its adapter elsewhere."""

import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from app.models.adapter_format import largest_rank, layer_names, unserved_settings
from app.models.adapter_io import load_adapter, read_adapter, save_model, write_adapter
from app.models.loading import (
    empty_model,
    load_config,
    load_float32,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from app.models.merging import SurvivedShares, check_mergeable, merge_adapter, round_trained
from app.models.plain_lora import plain_lora
from app.models.quantization import quantized_by
from app.models.source import ModelSource, resolve_model
from app.tracking.model_card import write_run_card
from app.tracking.record import RunRecord
from app.tracking.run_folder import RunFolder
from app.training.run_at_checkpoint import write_run_at_checkpoint
from app.utils.command_parser import CommandParser
from app.utils.console import say
from app.utils.errors import InputError
from app.utils.files import atomic_folder, read_yaml

DTYPES = ("float32", "bfloat16", "float16")
ENOUGH = 0.95
"""Share of an update below which a merged model is no longer called the trained one."""


def export_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of `export` and run it.

    Raises:
        InputError: Options do not fit, it is no finished run, the target exists, or the base model has changed.
    """
    parser = CommandParser("export", "Write a run's adapter or merged model.")
    add = parser.add_argument
    add("--run", required=True, type=Path, help="folder of a finished run")
    add(
        "--ckpt_path",
        type=Path,
        help="checkpoint of the run, which may be unfinished, to write instead of its last weights, such as "
        "a ModelCheckpoint's best",
    )
    add("--merge", action="store_true", help="write the base model with the adapter merged into it")
    add(
        "--dtype",
        choices=DTYPES,
        help="of a merged model's weights; default model.dtype of the run",
    )
    add(
        "--as",
        dest="kind",
        choices=["lora"],
        help="write AdaLoRA, or LoRA with patterns, as plain LoRA",
    )
    add("--output", type=Path, help="folder to write; default RUN/merged or RUN/exported_adapter")
    given = parser.parse_args(arguments)
    target = given.output or given.run / ("merged" if given.merge else "exported_adapter")
    _check_options(given, target)
    with TemporaryDirectory() as temporary:
        folder = RunFolder(given.run)
        if given.ckpt_path is not None:
            folder = RunFolder(Path(temporary))
            write_run_at_checkpoint(RunFolder(given.run), given.ckpt_path, folder)
        folder.check_finished()
        if folder.model.is_dir() and not given.merge:
            raise InputError(
                f"--run is {str(given.run)!r}, which trained the whole model and has no adapter: give --merge, "
                "which writes the model"
            )
        (_export_merged if given.merge else _export_adapter)(folder, target, given)
    print(f"wrote {target}")
    return 0


def _check_options(given: Namespace, target: Path) -> None:
    if given.dtype and not given.merge:
        raise InputError("--dtype is given without --merge: the weights of an adapter are float32")
    if given.kind and given.merge:
        raise InputError("--as and --merge are both given: a merged model has no adapter. Give one")
    if target.exists():
        expected = "remove it or name another folder"
        raise InputError(f"--output is {str(target)!r}, which exists: {expected}")


def _export_adapter(folder: RunFolder, target: Path, given: Namespace) -> None:
    """Write a run's adapter for all that reads PEFT's layout; say what servers have to know of it."""
    config, state = read_adapter(folder.adapter)
    if given.kind:
        config, state = plain_lora(config, state)
    with atomic_folder(target) as part:
        shutil.copytree(folder.adapter, part, dirs_exist_ok=True)
        write_adapter(config, state, part)
        write_run_card(folder, part)
    if unserved := unserved_settings(config.to_dict()):
        what, option = unserved
        say(f"warning: vLLM, SGLang and llama.cpp do not apply {what}: for them give {option}")
    else:
        rank = largest_rank(config, layer_names(state))
        print(f"servers need a max_lora_rank of {rank} or more (vLLM: --max-lora-rank)")


def _export_merged(folder: RunFolder, target: Path, given: Namespace) -> None:
    """Write a run's model with the adapter in its weights, or with all of them trained."""
    settings = read_yaml(folder.config, "--run")["model"]
    dtype_name = given.dtype or settings["dtype"]
    whole = folder.model.is_dir()
    if whole and dtype_name == settings["dtype"]:
        with atomic_folder(target) as part:
            shutil.copytree(folder.model, part, dirs_exist_ok=True)
            write_run_card(folder, part)
        return
    source = _unchanged_base(folder, settings)
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, dtype_name)
    if whole:
        trained = load_model(resolve_model(str(folder.model)))
        merged, survived = round_trained(trained, load_model(source), dtype)
    else:
        plain = replace(source, quantization=None)
        if quantized_by(plain, load_config(plain)) is None:  # else it has no weight of two modules
            check_mergeable(load_adapter(empty_model(plain), folder.adapter, trainable=False))
        adapted = load_adapter(load_float32(source), folder.adapter, trainable=False)
        merged, survived = merge_adapter(adapted, dtype)
    with atomic_folder(target) as part:
        save_model(merged, load_tokenizer(source), part)
        write_run_card(folder, part)
    _report(survived, dtype_name)


def _unchanged_base(folder: RunFolder, settings: dict[str, Any]) -> ModelSource:
    """Return where a run's base model is; raise InputError unless it can be merged with what was trained."""
    source = replace(resolve_model(settings["name"]), quantization=settings.get("quantization"))
    expected = RunRecord.read(folder.summary).model.fingerprint
    fingerprint = model_fingerprint(source)
    if fingerprint != expected:
        raise InputError(
            f"the base model {source.name} has fingerprint {fingerprint}, but the run was trained on "
            f"{expected}: the weights behind model.name have changed"
        )
    return source


def _report(survived: SurvivedShares, dtype: str) -> None:
    """Say how much of the update is in a merged model, and warn where that is too little."""
    if not survived.shares:
        say("warning: the training changed no weight: the merged model is the base model")
        return
    worst = survived.worst
    least = survived.shares[worst]
    print(
        f"share of the update that survives in {dtype}: {survived.mean:.1%} on average, {least:.1%} at least "
        f"({worst})"
    )
    if least < ENOUGH:
        say(
            f"warning: {dtype} rounds away a part of what was trained: give --dtype float32, or leave --merge "
            f"out and serve the adapter. `test --run RUN --merged {dtype}` scores the merged model"
        )
