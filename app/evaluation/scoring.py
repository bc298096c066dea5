"""What one pass over validation or test data measures: loss and label scores, and benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from app.evaluation.benchmark import BENCHMARK, PreparedBenchmark
from app.evaluation.metrics import LabelScores
from app.evaluation.runner import BenchmarkRunner, trained_weights_digest


class Scoring:
    """Takes batches of rows and batches of questions, and tells all scores at the end.

    Args:
        module: The `LoraModule`, whose weights do not change until `compute`.
        label_token_ids: First token of each label word; empty where rows have no classes.
        benchmarks: The benchmarks to ask.
        folder: Where their answers are kept; None keeps none.
        together: Whether the processes must run the model in step, since it is sharded.
    """

    def __init__(
        self,
        module: Any,
        label_token_ids: Sequence[int],
        benchmarks: Sequence[PreparedBenchmark],
        folder: Path | None,
        together: bool,
    ) -> None:
        self.module = module
        self.together = together
        self.rows = LabelScores(label_token_ids).to(module.device)
        self.runners: list[BenchmarkRunner] = []
        if benchmarks:
            identity = {
                "base": module.record.model.fingerprint,
                "weights": trained_weights_digest(module.model),
                "dtype": module.dtype_name,
                "precision": str(module.trainer.precision),
            }
            self.runners = [
                BenchmarkRunner(prepared, folder, identity, module.device)
                for prepared in benchmarks
            ]

    def update(self, batch: Mapping[str, Any]) -> None:
        """Score a batch of rows, or ask a batch of questions."""
        if BENCHMARK in batch:
            index = batch["index"].tolist()
            self.runners[batch[BENCHMARK]].ask(self.module, index, self.together)
        else:
            self.rows.update(self.module.supervised_logits(batch), batch["target"])

    def compute(self) -> dict[str, Tensor]:
        """Return the rows' scores and each benchmark's, the same on every process."""
        scores = self.rows.compute() if self.rows.tokens.update_called else {}
        for runner in self.runners:
            scores.update(runner.finish())
        return scores

    def results(self) -> dict[str, dict[str, Any]]:
        """Return what each benchmark found, by the name of its file of answers; after `compute`."""
        return dict(runner.result() for runner in self.runners)

    def speed(self) -> str:
        """Return how fast this process has been asking the benchmark that it asked last, or ""."""
        asking = [runner for runner in self.runners if runner.seconds]
        return f"{asking[-1].tokens / asking[-1].seconds:.0f} tokens/s" if asking else ""
