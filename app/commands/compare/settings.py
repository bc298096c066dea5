"""Which settings of two runs must agree for a comparison, and which ones make the method."""

from collections.abc import Iterable, Mapping
from typing import Any

from app.utils.class_paths import DROPPED, bare_name
from app.utils.errors import InputError
from app.utils.files import absolute_folder

OPTIMIZER = "model.optimizer"
RATE = f"{OPTIMIZER}.init_args.lr"
RANK = "model.adapter.r"
ALPHA = "model.adapter.lora_alpha"
METHOD = ("model.method", "model.adapter", OPTIMIZER, "init", "trainer.callbacks")
"""The method: what an overlay in configs/methods may change."""

FREE = (
    *("seed_everything", "output", "ckpt_path", "weights_only", "data.init_args.evals"),
    *("data.init_args.num_workers", "data.init_args.eval_batch_size", "trainer.logger"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.enable_checkpointing", "trainer.log_every_n_steps", "trainer.profiler"),
    *("trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
    *("trainer.limit_val_batches", "trainer.detect_anomaly"),
)
"""What changes neither the training nor its scores: how often is logged, where it is written."""

OBSERVERS = ("AlignmentMonitor",)
"""Callbacks that change nothing."""

Settings = dict[str, Any]


def flat(config: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return nested settings with dotted names; an empty section counts as null.

    Classes of the project have their bare names and today's settings, whatever version wrote them.
    """
    settings: Settings = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            settings |= flat(value, f"{name}.")
        elif name.endswith("class_path"):
            settings[name] = bare_name(str(value))
        elif name == "model.name" and isinstance(value, str):
            settings[name] = absolute_folder(value)  # as an earlier version has not written it
        else:
            settings[name] = None if value in ({}, []) else value
    if not prefix:
        for dropped in DROPPED.get(settings.get("data.class_path") or "", ()):
            settings.pop(f"data.init_args.{dropped}", None)
    return settings


def method_settings(config: Mapping[str, Any]) -> Settings:
    """Return what makes the method, without its learning rate."""
    settings = {
        name: value
        for name, value in flat(config).items()
        if _is_below(name, METHOD) and name != RATE
    }
    callbacks = settings.get("trainer.callbacks")
    if isinstance(callbacks, list):
        named = [{**c, "class_path": bare_name(str(c.get("class_path")))} for c in callbacks]
        acting = [c for c in named if c["class_path"] not in OBSERVERS]
        settings["trainer.callbacks"] = acting or None
    return settings


def task_settings(config: Mapping[str, Any]) -> Settings:
    """Return what all runs of a comparison share: model, data, budget, schedule."""
    return {
        name: value
        for name, value in flat(config).items()
        if not _is_below(name, METHOD) and not _is_below(name, FREE)
    }


def without_model_name(task: Settings) -> Settings:
    """Return a task's settings without the model's name: the same weights may lie elsewhere."""
    return {name: value for name, value in task.items() if name != "model.name"}


def rank_of(settings: Settings) -> int | None:
    """Return the rank of a method's adapter; None without one."""
    rank = settings.get(RANK)
    return rank if isinstance(rank, int) else None


def differences(left: Settings, right: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the settings whose values differ, with both; an absent one counts as null."""
    names = dict.fromkeys([*left, *right])
    pairs = {name: (left.get(name), right.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def differences_text(differing: Mapping[str, tuple[Any, Any]], most: int = 4) -> str:
    """Write differences as `data.init_args.max_length (128, 256)`."""
    parts = [f"{name} ({left}, {right})" for name, (left, right) in list(differing.items())[:most]]
    more = len(differing) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def _is_below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def check_reference(wanted: str | None, methods: Iterable[str | None]) -> None:
    """Raise InputError if none of the methods is the one that the others are to be compared to."""
    known = sorted({method for method in methods if method})
    if wanted is not None and wanted not in known:
        raise InputError(
            f"--reference is {wanted!r}, which is the method of no run: expected one of {', '.join(known)}"
        )
