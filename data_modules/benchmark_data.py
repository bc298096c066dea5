"""Benchmarks alone, asked of a model that is not trained."""

from typing import Literal

from app.evaluation.benchmark import Benchmark
from data_modules.text import TextDataModule


class BenchmarkDataModule(TextDataModule):
    """Ask the questions of benchmarks; there is nothing to train on.

    Args:
        evals: The benchmarks, in the order of their scores.
        eval_batch_size: Questions of a batch, on each process.
        chat_template: Put every prompt into the tokenizer's chat template, as the user's message.
        long_prompts: What to do with a question that leaves no room for its answer in the model's context:
            `cut` drops its beginning, `refuse` stops before anything is asked.
        seed: Not used by questions; those who train draw their rows with it.
    """

    task_name = "benchmarks"
    splits = ()

    def __init__(
        self,
        evals: list[Benchmark] | None = None,
        eval_batch_size: int = 64,
        chat_template: bool = False,
        long_prompts: Literal["cut", "refuse"] = "cut",
        seed: int = 0,
    ) -> None:
        super().__init__(
            evals=evals,
            eval_batch_size=eval_batch_size,
            chat_template=chat_template,
            long_prompts=long_prompts,
            seed=seed,
        )
