"""Refuse settings, callbacks and strategies of Lightning's trainer that cannot work with an adapter.

A private name of Lightning stands here alone: `_MultiProcessingLauncher`, the class of the launchers that start
processes from within Python; no public API tells them from others.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.distributed.fsdp import Fsdp2Strategy
from app.distributed.rendezvous import check_processes
from app.evaluation.scoring import score_names
from app.models.adapter_config import LoraSettings
from app.training.checks import check_sharded_benchmarks
from app.training.protocols import DataModule
from app.utils.arguments import listed
from app.utils.errors import InputError
from app.utils.text import did_you_mean

AVERAGES = (
    "averages a copy of the whole model that is made before the adapter is initialized, and checkpoints, "
    "which hold trained weights only, could not resume it: leave it out"
)
REFUSED: dict[type[Callback], str] = {
    LearningRateFinder: "trains before the adapter is initialized: compare learning rates with "
    "`python train.py compare --learning_rates 1e-4,1e-3`",
    BatchSizeFinder: "trains before the adapter is initialized: `python train.py plan` says what "
    "data.batch_size and data.eval_batch_size need",
    StochasticWeightAveraging: AVERAGES,
    WeightAveraging: AVERAGES,
    ModelPruning: "masks weights, and neither adapters nor checkpoints hold masks: leave it out",
    BaseFinetuning: "freezes and unfreezes layers, but model.adapter says what is trained (null trains "
    "every weight): leave it out",
    OnExceptionCheckpoint: "resumes by itself from what an earlier run has left: leave it out; "
    "output.checkpoint_every_n_steps says how often a run saves, and `--ckpt_path last` goes on from there",
}
"""Callbacks of Lightning that are refused, and why."""

ERRORS = (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError, OSError)
"""What Lightning raises of settings and of a launcher's environment while `LoraCLI` makes a trainer."""

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""Those that leave float32 factors as they are."""

KNOWN = frozenset(
    f"callbacks.{name}"
    for name in (
        "adalora_pruning.AdaLoraPruning",
        "alignment_monitor.AlignmentMonitor",
        "benchmark_results.BenchmarkResults",
        "checkpoints.Checkpoints",
        "lora_ga_init.LoraGaInit",
        "lora_one_init.LoraOneInit",
        "lora_sb_init.LoraSbInit",
        "loram_init.LoramInit",
        "mid_epoch_resume.MidEpochResume",
        "olora_init.OloraInit",
        "pissa_init.PissaInit",
        "plain_progress.PlainProgress",
        "preemption.Preemption",
        "run_report.RunReport",
        "save_config.SaveConfig",
        "score_at.ScoreAt",
    )
)
"""The project's callbacks, of which `logged_names` has all that they log."""


def check_trainer_settings(settings: Mapping[str, Any], command: str) -> None:
    """Raise InputError for settings of the section `trainer` that cannot work, before there is a trainer.

    Args:
        settings: With the objects that were made of callbacks and strategy.
        command: `fit` and `plan` run the callbacks.
    """
    strategy = settings["strategy"]
    if isinstance(strategy, FSDPStrategy) or str(strategy).startswith("fsdp"):
        raise InputError(
            f"trainer.strategy is {strategy!r}, which is FSDP1: give --config strategies/fsdp.yaml, "
            "which is FSDP2, instead"
        )
    if settings["use_distributed_sampler"]:
        raise InputError(
            "trainer.use_distributed_sampler is true, but the data module shares its rows among the processes "
            "itself: set it to false"
        )
    if settings["barebones"]:
        raise InputError(
            "trainer.barebones is true, which turns off what a run folder is made of: set it to false, and "
            "trainer.enable_checkpointing and trainer.enable_progress_bar, too, to save time"
        )
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0)):
        value = settings[name]
        if value is not None and value < least:
            raise InputError(f"trainer.{name} must be at least {least}, got {value}")
    if command in ("fit", "plan"):
        check_callbacks(listed(settings["callbacks"]), settings["accumulate_grad_batches"] > 1)


def check_callbacks(callbacks: Iterable[Callback], accumulates: bool) -> None:
    """Raise InputError for a callback that works against the initialization, the adapter or the checkpoints.

    Args:
        callbacks: The user's.
        accumulates: Whether `trainer.accumulate_grad_batches` is set.
    """
    for callback in callbacks:
        name = type(callback).__name__
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise InputError(f"trainer.callbacks has {name}, which {reason}")
        if isinstance(callback, GradientAccumulationScheduler) and accumulates:
            raise InputError(
                f"trainer.callbacks has {name}, but trainer.accumulate_grad_batches is set, too: leave one of "
                "them out"
            )


def check_strategy(trainer: Trainer) -> None:
    """Raise InputError for a strategy that neither replicates nor shards the base weights in a known way."""
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            f"trainer.strategy starts processes from within Python ({name} with spawn or fork), which keep "
            "the trained weights to themselves: use --config strategies/ddp.yaml"
        )
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | Fsdp2Strategy):
        raise InputError(
            f"trainer.strategy is {name}: expected auto, ddp, --config strategies/ddp.yaml, which replicates "
            "the base model, or --config strategies/fsdp.yaml, which shards it"
        )


def check_loops(
    trainer: Trainer, data: DataModule, adapter: LoraSettings | None, stage: str
) -> None:
    """Raise InputError for limits, intervals and monitors that do not fit the batches and what is logged.

    Lightning looks at them in a loop, in training behind the gradient pass.

    Args:
        trainer: Its limits and callbacks.
        data: Its batches and scores.
        adapter: What is trained.
        stage: "fit", "validate" or "test".
    """
    if isinstance(trainer.strategy, Fsdp2Strategy):
        asked = data.prepare_benchmarks("test" if stage == "test" else "validation")
        check_sharded_benchmarks(asked)
    if stage == "test":
        _check_limit(trainer, "test", data.test_dataloader())
    else:
        _check_limit(trainer, "val", data.val_dataloader())
    if stage != "fit":
        return
    loader, limit = data.train_dataloader(), trainer.limit_train_batches
    _check_limit(trainer, "train", [loader])
    batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
    every = trainer.val_check_interval  # type: ignore[attr-defined]  # set by its connector
    per_epoch = trainer.check_val_every_n_epoch is not None  # type: ignore[attr-defined]
    validates = trainer.limit_val_batches > 0 and batches > 0
    if isinstance(every, int) and every > batches and per_epoch and validates:
        raise InputError(
            f"trainer.val_check_interval is {every}, but an epoch has {batches} training batches: set "
            "trainer.check_val_every_n_epoch to null to count batches over epochs, or a smaller interval"
        )
    adalora = adapter is not None and adapter.adalora is not None
    check_monitors(trainer, logged_names(trainer, data, adalora))


def _check_limit(trainer: Trainer, split: str, loaders: Iterable[Sized]) -> None:
    """Raise InputError if `limit_{split}_batches` is a share of a set that makes less than one batch."""
    limit = getattr(trainer, f"limit_{split}_batches")
    for size in map(len, loaders):
        if isinstance(limit, float) and limit > 0 and size > 0 and int(size * limit) == 0:
            raise InputError(
                f"trainer.limit_{split}_batches (or trainer.overfit_batches) is {limit}, which is less than "
                f"one of {size} batches: set a whole number, or at least {1 / size:.3g}"
            )


def logged_names(trainer: Trainer, data: DataModule, adalora: bool) -> list[str]:
    """Return the names of what the module and the project's callbacks log while a model trains."""
    names = ["train/loss", "train/seconds"]
    if adalora:
        names += ["train/orthogonality", "adalora/triplets"]
    if trainer.limit_val_batches == 0:
        return names
    rows = len(data.rows("validation")) > 0
    scores = score_names(data.label_token_ids(), rows, data.prepare_benchmarks("validation"))
    return [*names, *(f"val/{name}" for name in scores)]


def check_monitors(trainer: Trainer, logged: Sequence[str]) -> None:
    """Raise InputError if a callback monitors a metric that nothing logs.

    Args:
        trainer: With all callbacks. One that is neither Lightning's nor in `KNOWN` may log anything; where
            there is one, a missing metric is an error of the first validation.
        logged: From `logged_names`.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    for kind in map(type, callbacks):
        path = f"{kind.__module__}.{kind.__qualname__}"
        if not path.startswith("lightning.") and path not in KNOWN:
            return
    known = [*logged, "epoch", "step"]  # the last two for ModelCheckpoint
    rates = any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        strict = getattr(callback, "strict", True)
        if isinstance(monitor, str) and strict and monitor not in known:
            if rates and monitor.startswith("lr-"):
                continue
            raise InputError(
                f"{type(callback).__name__}.monitor is {monitor!r}, which nothing logs"
                f"{did_you_mean(monitor, known) or '.'} There are {', '.join(logged)}"
            )


def check_precision(trainer: Trainer) -> None:
    """Raise InputError if the precision would convert the LoRA factors, which are float32 always."""
    precision = getattr(trainer.precision_plugin, "precision", PRECISIONS[0])
    if precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision is {precision}, which would convert the LoRA factors, too; they are float32 "
            "always. Set model.dtype for the base model's weights (bfloat16, float16), and "
            "trainer.precision bf16-mixed to compute in 16 bits"
        )


def is_misconfiguration(error: Exception) -> bool:
    """Return whether Lightning says that settings do not fit together.

    EarlyStopping raises a plain RuntimeError where there is no metric of that name.
    """
    missing = "Early stopping conditioned on metric"
    return isinstance(error, MisconfigurationException) or str(error).startswith(missing)


@contextmanager
def misconfiguration_in_one_line() -> Iterator[None]:
    """Raise InputError for what Lightning says of settings that do not fit together."""
    try:
        yield
    except (MisconfigurationException, RuntimeError) as error:
        if not is_misconfiguration(error):
            raise
        raise InputError(" ".join(str(error).split())) from error


def check_trainer(trainer: Trainer) -> None:
    """Raise InputError for settings that cannot work.

    Raises:
        ValueError: What Lightning says of the launcher's environment, which it would look at too late.
    """
    check_precision(trainer)
    check_strategy(trainer)
    strategy, nodes, devices = trainer.strategy, trainer.num_nodes, trainer.num_devices
    check_processes(nodes, devices, trainer.global_rank, trainer.local_rank)
    environment = getattr(strategy, "cluster_environment", None)
    if environment is not None:  # Slurm's tasks
        environment.validate_settings(devices, nodes)
    if strategy.root_device.type == "mps":
        # Scores and decompositions are in float64.
        raise InputError(
            "trainer.accelerator is mps (Apple's GPU), which has no float64: set trainer.accelerator cpu"
        )
    fsdp = strategy if isinstance(strategy, Fsdp2Strategy) else None
    if fsdp and fsdp.cpu_offload and fsdp.process_group_backend == "nccl":
        raise InputError(
            "trainer.strategy.process_group_backend is nccl, which sends nothing that cpu_offload keeps in "
            "host memory: leave process_group_backend null, or set it to cpu:gloo,cuda:nccl"
        )
