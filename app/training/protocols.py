"""What callbacks use of the module and of the data module, and where they get both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.evaluation.benchmark import PreparedBenchmark
from app.evaluation.scoring import Scoring
from app.evaluation.server import Server
from app.initialization.one_step_gradient import Estimator
from app.models.adapter_config import LoraSettings
from app.models.batch import Batch
from app.models.loading import ModelSource
from app.models.lora import LoraPair
from app.models.loss import Weighting
from app.tracking.record import RunRecord

Factors = dict[str, tuple[Tensor, Tensor]]
"""lora_A (r, n) and lora_B (m, r) by the layer's name."""


class ModelSettings(Protocol):
    """What a model is built from: settings of the section `model`."""

    dtype_name: str  # of the base weights, or of all weights of a merged model
    attn_implementation: str | None
    adapter: LoraSettings | None
    adapter_path: str | None
    merged: bool  # whether the saved adapter is merged into the weights
    gradient_checkpointing: bool

    @property
    def source(self) -> ModelSource:
        """Where the base model comes from."""


class AdaptedModule(ModelSettings, Protocol):
    """The LightningModule as callbacks know it."""

    name: str
    model: nn.Module  # what is called: the PEFT model, or the transformers model without an adapter
    record: RunRecord
    loss_weighting: Weighting
    answers_folder: Path | None  # where answers to benchmarks are kept; None keeps none
    scoring: Scoring  # of the validation or test loop that is running
    subtracted_factors: Factors  # what an initialization has taken off the base weights

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model inside."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, known without the weights."""

    @property
    def blueprint(self) -> nn.Module:
        """The model with its adapter on the meta device, known without the weights."""

    @property
    def is_sharded(self) -> bool:
        """Whether the strategy shards the base weights."""

    def lora_pairs(self) -> list[LoraPair]:
        """List the adapted layers in module order."""

    def install_and_subtract(self, factors: Factors) -> None:
        """Install factors and subtract them from the base."""

    def new_scoring(self, moment: str, split: str) -> Scoring:
        """Make ready to score the data module's rows and benchmarks."""


class DataModule(Protocol):
    """The data module as the module and callbacks know it."""

    task_name: str  # groups the runs of one task, such as `glue/sst2`
    batch_size: int  # training rows of a batch, on each process

    def rows(self, split: str) -> Sequence[Any]:
        """Return the rows of "train", "validation" or "test", each with `prompt` and `answer`."""

    def prepare_benchmarks(self, split: str) -> list[PreparedBenchmark]:
        """Return the benchmarks of "validation" or "test" with their questions encoded."""

    def label_token_ids(self) -> list[int]:
        """Return the first token of each label word; empty where rows have no classes."""

    def train_dataloader(self) -> Any:
        """Return batches of the training rows."""

    def val_dataloader(self) -> list[Any]:
        """Return batches of the validation rows and of each benchmark's questions."""

    def test_dataloader(self) -> list[Any]:
        """Return batches of the test rows and of each benchmark's questions."""

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from and how many there are."""

    def gradient_batches(
        self,
        num_samples: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        drawn: bool = True,
        last: bool = False,
    ) -> list[Batch]:
        """Return this process's share of the initialization rows, or of those that are taken last."""


class GradientInitialization(Protocol):
    """An initialization of the adapter that is made of the one-step gradient, as commands know it."""

    num_samples: int
    micro_batch_size: int
    estimator: Estimator
    drawn: bool  # whether its rows are drawn, or the first ones
    weighting: Weighting
    train_mode: bool


def adapted(pl_module: LightningModule) -> AdaptedModule:
    """Return a callback's `pl_module` as what it is."""
    return cast(AdaptedModule, pl_module)


def data_of(trainer: Trainer) -> DataModule:
    """Return a trainer's data module."""
    return cast(DataModule, trainer.datamodule)  # type: ignore[attr-defined]  # set by `fit`


def server_of(trainer: Trainer) -> Server | None:
    """Return the server that generates outputs instead of the model, if the data module has one."""
    return getattr(trainer.datamodule, "server", None)  # type: ignore[attr-defined]


def logged_scores(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Return the scores that a validation ("val/") or test ("test/") has just logged, without the prefix."""
    logged = trainer.callback_metrics.items()
    return {k.removeprefix(prefix): float(value) for k, value in logged if k.startswith(prefix)}
