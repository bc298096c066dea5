"""Watch the factors while they train: angles to the one-step gradient, spectra, condition."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from app.distributed.processes import is_first_process
from app.initialization.alignment import measure_alignment
from app.initialization.factors import SVD
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.lora import LoraPair
from app.tracking.alignment_plots import MAPS, write_heat_maps
from app.tracking.loggers import run_folder_of
from app.tracking.metrics_table import append_rows, read_table, write_table
from app.tracking.run_folder import RunFolder
from app.tracking.tensorboard_summary import log_histograms, log_pictures
from app.tracking.wandb_summary import line_chart, log_plots
from app.training.protocols import AdaptedModule, adapted, data_of
from app.utils.console import track, warn_on_failure
from app.utils.errors import InputError
from callbacks.initialization import GradientInit

ALIGNMENT_FILE = "alignment.csv"
EARLIER_FILE = "inside.csv"
"""What earlier versions called it."""


class AlignmentMonitor(Callback):
    """Measure every LoRA pair before training, every few optimizer steps, and at the end.

    A model without LoRA pairs (AdaLoRA, full fine-tuning) is left alone. `alignment.csv` in the run folder
    has a row for each layer and moment, `alignment_*.png` draw it, and the loggers get the median over layers
    as `alignment/...` (W&B the histograms, too). The measures are those of `app.initialization.alignment`; the
    reference is the one-step gradient of the untouched base model. Where the initialization observes that
    gradient, it is taken from there; else this callback makes a pass of its own before training.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        num_samples: Training rows of the callback's own pass.
        micro_batch_size: Rows of one forward and backward pass in it.
    """

    def __init__(
        self, every_n_steps: int = 10, num_samples: int = 64, micro_batch_size: int = 8
    ) -> None:
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"AlignmentMonitor.{name} must be at least 1, got {value}")
        self._reference: dict[str, SVD] = {}
        self._measured = -1  # the step that was measured last

    def state_dict(self) -> dict[str, Any]:
        """Keep the reference: a resumed run makes no gradient pass."""
        reference = {
            name: [part.cpu() for part in (svd.U, svd.S, svd.V)]
            for name, svd in self._reference.items()
        }
        return {"reference": reference, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the reference of the interrupted run."""
        self._reference = {name: SVD(*parts) for name, parts in state_dict["reference"].items()}
        self._measured = state_dict["measured"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the initialization to keep its gradient."""
        for init in _gradient_inits(trainer):
            init.kept = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the one-step gradient before any initialization changes the model, unless that does it."""
        module = adapted(pl_module)
        if not module.lora_pairs():
            rank_zero_info(
                f"{module.record.method} has no LoRA pairs: no alignment metrics are measured"
            )
        elif self._reference:
            self._rewind(trainer)
        elif module.subtracted_factors:
            raise InputError(
                "AlignmentMonitor measures against the untouched base model, but the initialization of this "
                "resumed run has changed that: leave the callback out of trainer.callbacks, or start anew"
            )
        elif all(init.report for init in _gradient_inits(trainer)):
            result = one_step_gradients(
                module.model,
                module.base,
                module.lora_pairs(),
                data_of(trainer).gradient_batches(
                    self.num_samples, self.micro_batch_size, trainer.global_rank, trainer.world_size
                ),
                {pair.name: pair.rank for pair in module.lora_pairs()},
                Estimator(),
                trainer.precision_plugin.forward_context,
                track,
                module.loss_weighting,
            )
            self._set_reference(module, {name: e.svd for name, e in result.estimates.items()})

    def _set_reference(self, module: AdaptedModule, gradients: dict[str, SVD]) -> None:
        # The gradient points uphill; the spans do not know the sign.
        self._reference = {
            pair.name: SVD(*(part[..., : pair.rank] for part in gradients[pair.name]))
            for pair in module.lora_pairs()
        }

    def _rewind(self, trainer: Trainer) -> None:
        """Drop what the interrupted run measured after its checkpoint."""
        folder = _folder(trainer)
        if folder is None:
            return
        path = folder.path / ALIGNMENT_FILE
        if not path.is_file() and (folder.path / EARLIER_FILE).is_file():
            (folder.path / EARLIER_FILE).rename(path)
        names, rows = read_table(path)
        if names:
            write_table(path, names, [r for r in rows if int(r["step"]) <= self._measured])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the initialization has made."""
        for init in _gradient_inits(trainer):
            if init.kept:
                self._set_reference(adapted(pl_module), init.kept)
                init.kept = None
        if self._measured < 0:
            self._measure(trainer, adapted(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure after every few optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, adapted(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end and draw."""
        self._measure(trainer, adapted(pl_module))
        folder = _folder(trainer)
        if folder is None or not self._reference:
            return
        table = folder.path / ALIGNMENT_FILE
        with warn_on_failure("drawing the alignment metrics"):
            plots = write_heat_maps(table, folder.path)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    log_plots(logger, plots)
                    logger.experiment.log({"alignment/angles": _alignment(table)})
                if isinstance(logger, TensorBoardLogger):
                    log_pictures(logger, plots, trainer.global_step)
            rank_zero_info(f"alignment metrics: {table} and {len(plots)} heat maps")

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: AdaptedModule) -> None:
        step = trainer.global_step
        # The factors are whole on every process, also where the base is sharded.
        if step == self._measured or not self._reference:
            return
        self._measured = step
        folder = _folder(trainer)
        if folder is None:
            return
        rows = measure(module.lora_pairs(), self._reference)
        with warn_on_failure("writing the alignment metrics"):
            path = folder.path / ALIGNMENT_FILE
            names = ["step", *max(rows, key=len)]  # a rank pattern leaves some spectra shorter
            if not path.is_file():
                write_table(path, names, [])
            append_rows(path, names, [{"step": step, **row} for row in rows])
        columns = {name: torch.tensor([row[name] for row in rows]) for name in MAPS}
        # Medians: a layer that is singular or has no span has no say.
        medians = {
            f"alignment/{name}": float(values.nanmedian())
            for name, values in columns.items()
            if not values.isnan().all()
        }
        for logger in trainer.loggers:
            logger.log_metrics(medians, step=max(step - 1, 0))
            if isinstance(logger, WandbLogger):
                with warn_on_failure("logging the alignment metrics to W&B"):
                    _log_histograms(logger, columns, step)
            if isinstance(logger, TensorBoardLogger):
                with warn_on_failure("logging the alignment metrics to TensorBoard"):
                    by_name = {f"alignment_layers/{name}": v for name, v in columns.items()}
                    log_histograms(logger, by_name, step)


def _folder(trainer: Trainer) -> RunFolder | None:
    """Return the run folder on the process that writes to it."""
    return run_folder_of(trainer.loggers) if is_first_process() else None


def _gradient_inits(trainer: Trainer) -> list[GradientInit]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    inits = (callback for callback in callbacks if isinstance(callback, GradientInit))
    return [init for init in inits if init.estimator.kind != "signs"]


def measure(pairs: list[LoraPair], reference: dict[str, SVD]) -> list[dict[str, Any]]:
    """Measure all pairs, equal shapes together.

    Args:
        pairs: The adapted layers.
        reference: The leading triplets of each layer's one-step gradient, by name.

    Returns:
        A row for each layer, in the pairs' order: `layer`, the measures, and the singular values of
        Delta W as `sv_1`, `sv_2`, ...
    """
    alike: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        alike[pair.lora_A.shape, pair.lora_B.shape, pair.scaling].append(pair)
    rows: dict[str, dict[str, Any]] = {}
    for group in alike.values():
        device = group[0].lora_A.device
        metrics = measure_alignment(
            [pair.lora_A for pair in group],
            [pair.lora_B for pair in group],
            group[0].scaling,
            [SVD(*(part.to(device) for part in reference[pair.name])) for pair in group],
        )
        for i, pair in enumerate(group):
            spectrum = {f"sv_{j + 1}": float(v) for j, v in enumerate(metrics.singular_values[i])}
            values = {name: float(getattr(metrics, name)[i]) for name in MAPS}
            rows[pair.name] = {"layer": pair.name, **values, **spectrum}
    return [rows[pair.name] for pair in pairs]


def _alignment(table: Path) -> Any:
    """Return W&B's own line chart of the angles over steps: the median over layers.

    A step at which no layer has an angle is left out: the chart's JSON has no word for it.
    """
    import pandas as pd  # slow

    angles = pd.read_csv(table).groupby("step")[["angle_A", "angle_B"]]
    # As torch.nanmedian: of two in the middle the lower one.
    medians = angles.quantile(0.5, interpolation="lower")
    names = {"angle_A": "lora_A, input side", "angle_B": "lora_B, output side"}
    lines = {name: medians[key].dropna().to_dict() for key, name in names.items()}
    return line_chart(lines, "Angle to the one-step gradient (degrees)", "optimizer step")


def _log_histograms(logger: WandbLogger, columns: dict[str, Tensor], step: int) -> None:
    import wandb  # slow, and of no use to a run without it

    histograms = {
        f"alignment_layers/{name}": wandb.Histogram(values[values.isfinite()].tolist())
        for name, values in columns.items()
        if values.isfinite().any()
    }
    logger.experiment.log({**histograms, "trainer/global_step": step})
