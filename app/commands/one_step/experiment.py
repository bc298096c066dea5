"""Score the steps of a grid on a run's model and rows, before any training."""

import time
from functools import partial

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.commands.one_step.choice import chosen, step_text
from app.commands.one_step.command import UNTOUCHED, Grid, Step
from app.commands.one_step.measurements import VALIDATION, Measurements, Rows
from app.commands.one_step.report import scores_text
from app.commands.one_step.scores import Scorer
from app.initialization.factors import common_unit
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.initialization.weight_step import WholeGradient, stepped, whole_gradients
from app.models.lora import lora_pairs, tied_target_layers
from app.models.quantization import quantized_by
from app.training.protocols import GradientInitialization, adapted, data_of
from app.utils.console import track
from app.utils.errors import InputError


def check(trainer: Trainer, pl_module: LightningModule, grid: Grid) -> None:
    """Raise InputError if the grid does not fit the run's rows or layers, before weights are loaded."""
    module, data = adapted(pl_module), data_of(trainer)
    rows, samples = len(data.rows("train")), max(grid.samples)
    if samples + grid.eta_rows > rows:
        raise InputError(
            f"--samples {samples} and --eta_rows {grid.eta_rows} are more than the {rows} training rows, but "
            "the rows that choose eta must be in no gradient: give fewer"
        )
    if not data.rows("validation") and not data.prepare_benchmarks("validation"):
        raise InputError(
            "there are no validation rows to score the steps on: set data.validation_size"
        )
    if quantized := quantized_by(module.source, module.config):
        raise InputError(
            f"one_step moves the base weights, but those of model.name {module.name!r} are quantised "
            f"({quantized}), codes that hold no difference: use weights that are not"
        )
    shapes = {
        pair.name: (pair.lora_B.shape[0], pair.lora_A.shape[1])
        for pair in lora_pairs(module.blueprint)
    }
    smallest = min(shapes, key=lambda name: min(shapes[name]))
    if grid.largest_rank > min(shapes[smallest]):
        raise InputError(
            f"--ranks has {grid.largest_rank}, but the weight of {smallest} is {shapes[smallest]}, of rank "
            f"{min(shapes[smallest])} at most: give smaller ranks, or full"
        )


class Experiment:
    """Measure what a grid has and a file of measurements lacks; the model is left as it was.

    Args:
        trainer: Its precision and data module.
        pl_module: The module, whose adapter names the layers and takes no part.
        grid: The steps.
        measurements: What has been measured; each score is added at once.
        init: How the run takes its gradient: which rows, which mean, in which mode; its micro-batches.

    Raises:
        InputError: Another module has the weight of an adapted layer, too.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        grid: Grid,
        measurements: Measurements,
        init: GradientInitialization,
    ) -> None:
        self.trainer, self.module = trainer, adapted(pl_module)
        self.grid, self.measurements, self.init = grid, measurements, init
        for layer, other in tied_target_layers(self.module.model).items():
            raise InputError(
                f"one_step moves the weight of {layer}, but that is the weight of {other} too "
                f"(tie_word_embeddings): leave {layer} out of model.adapter.target_modules"
            )
        self.scorer = Scorer(trainer, pl_module, grid.eta_rows, init)
        self._samples = 0  # those of the gradients that are at hand
        self._gradients: dict[str, WholeGradient] = {}  # by layer

    def run(self) -> None:
        """Score every step on the rows that choose eta, and those that they choose on the validation set."""
        for rows in (self.grid.eta_rows, VALIDATION):
            self._add(UNTOUCHED, rows)
        for samples in self.grid.samples:
            for series in self.grid.series(samples):
                for step in series:
                    self._add(step, self.grid.eta_rows)
                self._add(chosen(self.measurements, series, self.grid.eta_rows), VALIDATION)

    def _add(self, step: Step, rows: Rows) -> None:
        if (step, rows) in self.measurements:
            return
        began = time.perf_counter()
        if step == UNTOUCHED:
            scores = self.scorer.score(rows)
        else:
            self._observe(step.samples)
            with stepped(self.module.lora_pairs(), partial(self._step, step)):
                scores = self.scorer.score(rows)
        text = scores_text(self.measurements.add(step, rows, scores))
        where = rows if rows == VALIDATION else f"{rows} training rows"
        print(
            f"{step_text(step)}, {where}: {text}; {time.perf_counter() - began:.0f} s", flush=True
        )

    def _observe(self, samples: int) -> None:
        """Take the gradient over so many training rows, unless it is at hand."""
        if self._samples == samples:
            return
        self._gradients = {}  # frees them before others are made
        init = self.init
        result = one_step_gradients(
            self.module.model,
            self.module.base,
            self.module.lora_pairs(),
            data_of(self.trainer).gradient_batches(
                samples, init.micro_batch_size, 0, 1, init.drawn
            ),
            self.grid.largest_rank,
            Estimator("exact"),
            self.trainer.precision_plugin.forward_context,
            track,
            init.weighting,
            init.train_mode,
        )
        self._samples, self._gradients = samples, whole_gradients(result)
        self._largest = common_unit(each.svd for each in self._gradients.values())

    def _step(self, step: Step, layer: str) -> Tensor:
        """Return the step (m, n) of a layer; none where the gradient is zero."""
        gradient = self._gradients[layer]
        unit = float(gradient.svd.S[0]) if step.scale == "layer" else self._largest
        size = step.eta / unit if unit > 0 else 0.0
        return gradient.step(size, step.rank if isinstance(step.rank, int) else None)
