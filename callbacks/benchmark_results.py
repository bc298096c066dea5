"""Where answers to benchmarks go, how fast they come, and the scores of a test, of each row too."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from app.evaluation.answers import answer_tables
from app.evaluation.scoring import lower_is_better
from app.tracking.loggers import OutputSettings, run_folder_of
from app.tracking.model_card import write_run_card
from app.tracking.record import RunRecord
from app.tracking.row_scores import write_row_scores
from app.tracking.run_folder import RunFolder
from app.tracking.run_text import finished_text
from app.tracking.tensorboard_summary import log_texts
from app.tracking.wandb_summary import log_answers, log_test_scores
from app.training.held_out import check_held_out
from app.training.protocols import adapted, data_of, logged_scores
from app.utils.console import warn_on_failure
from app.utils.files import read_json, write_json


class BenchmarkResults(Callback):
    """Keep the answers below the run folder or a folder of tests, and write down a test's scores.

    Args:
        folder: Where tests go; None where a run is trained, whose own folder takes the answers.
        output: Whether a test is logged to W&B; None where a run is trained.
    """

    def __init__(self, folder: Path | None = None, output: OutputSettings | None = None) -> None:
        self.folder = None if folder is None else RunFolder(folder)
        self.output = output

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the module's folder of answers, and look whether a run is scored on rows that it has not seen."""
        folder = self.folder
        # The scores of a merged model have a folder in the run's.
        places = () if folder is None else map(RunFolder, (folder.path, folder.path.parent))
        if run := next((place for place in places if place.summary.is_file()), None):
            check_held_out(RunRecord.read(run.summary).data, data_of(trainer), stage)
        if folder is None and stage == "fit":
            folder = trainer.strategy.broadcast(run_folder_of(trainer.loggers))
        adapted(pl_module).answers_folder = None if folder is None else folder.answers

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Show the speed beside the bar of a validation or test."""
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar):
            shown = bar.test_progress_bar if trainer.testing else bar.val_progress_bar
            shown.set_postfix_str(adapted(pl_module).scoring.speed())

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Show the speed beside the bar."""
        self.on_validation_batch_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the answers that have references, of all moments of the run, as tables (TensorBoard: text)."""
        folder = adapted(pl_module).answers_folder
        if folder is not None and trainer.is_global_zero:
            tables = cache(partial(answer_tables, folder))  # read once, and for these loggers alone
            for logger in trainer.loggers:
                with warn_on_failure("logging the answers to benchmarks"):
                    if isinstance(logger, WandbLogger):
                        log_answers(logger, tables())
                    if isinstance(logger, TensorBoardLogger):
                        log_texts(logger, tables(), trainer.global_step, "answers/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the scores to the run's summary and W&B run, those of benchmarks to earlier tests'."""
        if self.folder is None or not trainer.is_global_zero:
            return
        scoring = adapted(pl_module).scoring
        write_row_scores(self.folder, "test", scoring.rows.rows)
        results = scoring.results()
        if results:
            path = self.folder.scores
            write_json(path, {**(read_json(path) or {}), **results})
        summary = self.folder.summary
        if summary.is_file():
            record = RunRecord.read(summary)
            scores = logged_scores(trainer, "test/")
            record.metrics["test"] = {**record.metrics.get("test", {}), **scores}
            less = lower_is_better(data_of(trainer).prepare_benchmarks("test"))
            record.lower_is_better = sorted({*record.lower_is_better, *less})
            record.write(summary)
            for trained in (self.folder.adapter, self.folder.model):
                if trained.is_dir():
                    write_run_card(self.folder, trained)
            if self.output is not None:
                tables = answer_tables(self.folder.answers)
                log_test_scores(self.folder, self.output, tables)
            rank_zero_info(finished_text(record, self.folder, tested=True))
            trainer.test_loop.verbose = False  # Lightning's table has the same scores
        if results:
            rank_zero_info(f"scores: {self.folder.scores}\nanswers: {self.folder.answers}")
