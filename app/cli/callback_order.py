"""The callbacks of a run, in the order in which Lightning calls them."""

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar

from app.utils.console import on_terminal
from app.utils.signals import StopSignals
from callbacks.adalora_pruning import AdaLoraPruning
from callbacks.benchmark_results import BenchmarkResults
from callbacks.checkpoints import Checkpoints
from callbacks.mid_epoch_resume import MidEpochResume
from callbacks.plain_progress import PlainProgress
from callbacks.preemption import Preemption
from callbacks.run_report import RunReport
from callbacks.score_at import ScoreAt


def fit_callbacks(
    init: Callback | None,
    seed: int,
    signals: StopSignals,
    continues: bool,
    every_n_steps: int | None,
) -> list[Callback]:
    """List the callbacks of a `fit`, which follow those of the user.

    Args:
        init: Fills the adapter; None keeps PEFT's initialization.
        seed: The run's seed.
        signals: Note a request to stop.
        continues: Whether the run goes on in the folder of its checkpoint.
        every_n_steps: Optimizer steps between two checkpoints; None writes none.
    """
    checkpoints = None if every_n_steps is None else Checkpoints(every_n_steps)
    preemption = Preemption(signals, checkpoints.save if checkpoints else None)
    return [
        AdaLoraPruning(),  # before all that measure or save the adapter
        MidEpochResume(seed, continues),  # notes the place that the callbacks below save
        ScoreAt("zero_shot"),  # the untouched model
        *([init] if init else []),
        ScoreAt("after_init", same_as=None if init else "zero_shot"),
        ScoreAt("final", between_batches=preemption.stop_if_asked),
        BenchmarkResults(),
        RunReport(seed),  # when all scores are there
        preemption,
        *([checkpoints] if checkpoints else []),  # Lightning puts these behind the user's, too
    ]


def progress_bar() -> Callback:
    """Return what shows the progress: a bar on a terminal, plain lines in a log file."""
    return TQDMProgressBar() if on_terminal() else PlainProgress()
