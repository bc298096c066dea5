"""Messages of libraries that no user can act on."""

import logging
import warnings


def silence() -> None:
    """Drop what no user can act on: advertisements, absent hardware, deprecations inside libraries."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_says_something)
    for inside in (
        "Experiment logs directory .* exists and is not empty",  # make_loggers has just made it
        "The dirpath has changed from",  # a run that goes on from another folder's checkpoint
        "You're resuming from a checkpoint that ended before",  # the data module knows its position
        "`is_gradient_checkpointing` is deprecated",
        "`gradient_checkpointing_enable` is deprecated",
        r"`isinstance\(treespec, LeafSpec\)`",
        "It is recommended to use `self.log",  # what is logged has been reduced over processes already
    ):
        warnings.filterwarnings("ignore", message=inside)


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡", "TPU available", "Seed set"))
