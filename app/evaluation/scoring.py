"""Score one pass over validation or test data: loss and metrics of rows, and benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.evaluation.benchmark import BENCHMARK, PreparedBenchmark
from app.evaluation.metrics import LabelScores
from app.evaluation.runner import BenchmarkRunner, trained_weights_digest
from app.models.batch import Batch
from app.models.protocols import ScoredModel


def score_names(
    label_token_ids: Sequence[int], rows: bool, benchmarks: Sequence[PreparedBenchmark]
) -> list[str]:
    """Return the names of what `Scoring.compute` returns of rows, if there are any, and of benchmarks."""
    names = LabelScores(label_token_ids).names if rows else []
    for prepared in benchmarks:
        benchmark, questions = prepared.benchmark, [each.question for each in prepared.questions]
        means = dict.fromkeys(benchmark.score_names(questions), 0.0)
        names += [f"{benchmark.name}/{name}" for name in benchmark.combine(means)]
    return names


def lower_is_better(benchmarks: Sequence[PreparedBenchmark]) -> list[str]:
    """Return the names of the benchmarks' scores of which less is better."""
    each = (prepared.benchmark for prepared in benchmarks)
    return [f"{one.name}/{name}" for one in each for name in sorted(one.lower_is_better)]


class Scoring:
    """Accumulate the scores of batches of rows and of batches of questions.

    The weights of `module` do not change until `compute`. See `LabelScores` and `BenchmarkRunner` for the rest.

    Args:
        identity: What names the module but its weights: base model, dtype, precision. JSON data.
    """

    def __init__(
        self,
        module: ScoredModel,
        identity: Mapping[str, str | None],
        label_token_ids: Sequence[int],
        benchmarks: Sequence[PreparedBenchmark],
        folder: Path | None,
        together: bool,
    ) -> None:
        self.module = module
        self.rows = LabelScores(label_token_ids).to(module.device)
        self.runners: list[BenchmarkRunner] = []
        if benchmarks:
            whole = {**identity, "weights": trained_weights_digest(module.model)}
            self.runners = [
                BenchmarkRunner(module, prepared, folder, whole, together)
                for prepared in benchmarks
            ]

    def update(self, batch: Batch) -> None:
        """Score a batch of rows, or ask a batch of questions."""
        if BENCHMARK in batch:
            self.runners[int(batch[BENCHMARK])].ask(batch["index"].tolist())
        else:
            output = self.module.supervised_logits(batch)
            self.rows.update(output, batch["target"], batch["index"])

    def compute(self) -> dict[str, Tensor]:
        """Return the rows' scores and each benchmark's, the same on every process."""
        scores = self.rows.compute() if self.rows.updated else {}
        for runner in self.runners:
            for name, value in runner.finish().items():
                scores[f"{runner.name}/{name}"] = torch.tensor(value)
        return scores

    def results(self) -> dict[str, dict[str, Any]]:
        """Return scores and counts of each benchmark by the stem of its file of answers; after `compute`."""
        return {
            runner.file.stem if runner.file else runner.name: {
                **runner.identity,
                "scores": runner.scores,
                **runner.counts,
            }
            for runner in self.runners
        }

    def speed(self) -> str:
        """Return how fast this process has been asking the benchmark that it asked last, or ""."""
        asked = [runner for runner in self.runners if runner.seconds]
        return f"{asked[-1].tokens / asked[-1].seconds:.0f} tokens/s" if asked else ""
