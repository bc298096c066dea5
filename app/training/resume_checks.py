"""Refuse to resume a run with settings that change what is computed; say what its checkpoint overrules."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.training.resume import ResumePoint
from app.utils.class_paths import bare_name
from app.utils.errors import InputError

ADAPTER = ("model.adapter",)
"""What a checkpoint that is only scored must agree with."""
WRITTEN = (*ADAPTER, "model.adapter_path", "init")
"""What a checkpoint that is exported must agree with: its factors, their scaling, what they are added to."""
TRAINING = (
    *("seed_everything", "model", "data", "init", "trainer.precision", "trainer.overfit_batches"),
    *("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
    "trainer.limit_train_batches",
)
"""What a run that goes on must agree with, as far as it is not in `FREE`."""
FREE = (
    "model.name",  # its weights have a fingerprint
    *("model.attn_implementation", "model.gradient_checkpointing"),  # the same numbers to rounding
    "data.path",  # its rows have a digest
    "data.batch_size",  # see `check_rows_per_step`
    *("data.eval_batch_size", "data.num_workers", "data.evals", "data.long_prompts"),
    "init.micro_batch_size",  # memory and speed of a pass that is over
)
PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names, and what they are short for; null is `32`."""
COMPUTES: Mapping[str, Callable[[Any], Any]] = {
    "trainer.precision": lambda value: PRECISIONS.get(str(value or 32), value),
    "trainer.gradient_clip_val": lambda value: value or 0,
    "trainer.gradient_clip_algorithm": lambda value: value or "norm",
    # A fraction of the rows, or a number of batches: 1.0 is all of them, 1 is one.
    "trainer.limit_train_batches": lambda value: repr(1.0 if value is None else value),
    "trainer.overfit_batches": lambda value: repr(value or 0),
    # Another folder may have another scaling, which no checkpoint holds.
    "model.adapter_path": lambda value: None if value is None else Path(value).resolve(),
}
"""What a value of a setting stands for: values that stand for the same are not different."""
OPTIMIZER = "model.optimizer."

Settings = Mapping[str, Any]


def check_settings(point: ResumePoint, settings: Settings, fixed: tuple[str, ...]) -> None:
    """Raise InputError if settings of the checkpoint's run and of the command differ; warn of those overruled.

    The state of an optimizer brings back its learning rate and whatever else stands in its parameter groups.

    Args:
        point: The checkpoint.
        settings: Of the command, resolved.
        fixed: Names or sections that must agree, `TRAINING`, `ADAPTER` or `WRITTEN`.
    """
    overruled: list[str] = []
    refused: list[str] = []
    for name, (then, now) in sorted(differences(point.settings or {}, settings).items()):
        if _is_in(name, fixed) and not _is_in(name, FREE):
            restored = name.startswith(OPTIMIZER) and name.rpartition(".")[2] in point.restored
            listed = overruled if restored else refused
            listed.append(f"{name} {_shown(then)} (now {_shown(now)})")
    if refused:
        remedy = (
            "Give those of that run, or leave ckpt_path out for a new one"
            if fixed is TRAINING
            else "Give that run, or another ckpt_path"
        )
        raise InputError(
            f"the checkpoint {str(point.checkpoint)!r} is of a run with other settings: {', '.join(refused)}. "
            f"{remedy}"
        )
    if overruled:
        rank_zero_warn(
            f"the optimizer goes on with what its checkpoint holds: {', '.join(overruled)}. A new run, without "
            "ckpt_path, takes the new values"
        )


def check_rows_per_step(point: ResumePoint, settings: Settings, processes: int) -> None:
    """Raise InputError if the batches are set so that a step has other rows; warn if the processes do that.

    Args:
        point: The checkpoint.
        settings: Of the command, resolved.
        processes: Those of the run that goes on.
    """
    then, now = _rows_of_batches(point.settings or settings), _rows_of_batches(settings)
    if then * point.processes == now * processes:
        return
    message = (
        f"an optimizer step of the checkpoint's run has {then * point.processes} rows, this one "
        f"{now * processes} (data.batch_size times trainer.accumulate_grad_batches times {processes} "
        f"processes, {point.processes} then): "
    )
    if then != now:
        raise InputError(
            f"{message}set the first two so that the rows are as many, or leave ckpt_path out"
        )
    rank_zero_warn(f"{message}set the first two so that the rows are as many")


def _rows_of_batches(settings: Settings) -> int:
    """Return how many rows one process takes for a step."""
    rows: int = settings["data"]["init_args"].get("batch_size", 1)
    return rows * settings["trainer"]["accumulate_grad_batches"]


def rows_digest(rows: Iterable[Any]) -> str:
    """Return a digest of rows, each with a prompt and an answer, in their order."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(f"{row.prompt}\0{row.answer}\0".encode(errors="surrogatepass"))
    return whole.hexdigest()


def check_rows(point: ResumePoint, digest: str) -> None:
    """Raise InputError if the training rows are not those of the checkpoint's run."""
    if point.rows is not None and point.rows != digest:
        raise InputError(
            f"the training rows are not those of the run of the checkpoint {str(point.checkpoint)!r}: set "
            "data.path to the data of that run, or leave ckpt_path out for a new one"
        )


def differences(then: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings whose values differ, with both.

    A setting that only one side has is one of another version. Arguments of a class are named as options name
    them, without `init_args`.
    """
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)) or name.endswith("_pattern"):
        same = COMPUTES.get(name, lambda value: value)
        return {} if same(then) == same(now) else {name: (then, now)}
    kinds = [bare_name(str(side["class_path"])) for side in (then, now) if "class_path" in side]
    if len(set(kinds)) == 2:
        return {name: (kinds[0], kinds[1])}
    found: dict[str, tuple[Any, Any]] = {}
    for key in (key for key in then if key in now and key != "class_path"):
        inner = name if key == "init_args" else f"{name}.{key}" if name else key
        found |= differences(then[key], now[key], inner)
    return found


def _is_in(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _shown(value: Any) -> str:
    """Return a value in one word or a few."""
    if isinstance(value, Mapping) and "class_path" in value:
        return bare_name(str(value["class_path"]))
    return "null" if value is None else str(value)
