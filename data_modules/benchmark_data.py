"""Benchmarks alone, asked of a model that is not trained."""

from dataclasses import replace
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from app.evaluation.benchmark import Benchmark, PreparedBenchmark
from app.evaluation.server import Server
from app.utils.errors import InputError
from data_modules.text import TextDataModule


class BenchmarkDataModule(TextDataModule):
    """Ask the questions of benchmarks; there is nothing to train on.

    Args:
        evals: The benchmarks, in the order of their scores.
        eval_batch_size: Questions of a batch, on each process.
        chat_template: Put every prompt into the tokenizer's chat template, as the user's message.
        long_prompts: What to do with a question that leaves no room for its answer in the model's context:
            `cut` drops its beginning, `refuse` stops before anything is asked.
        server: Server of OpenAI's API that generates the outputs; null generates them with the model, whose
            weights a server leaves unloaded.
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
        server: Server | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            evals=evals,
            eval_batch_size=eval_batch_size,
            chat_template=chat_template,
            long_prompts=long_prompts,
            seed=seed,
        )
        self.server = server
        self._served: str | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find the server, if there is one, before anything is read; then as the base does."""
        if self.server is not None:
            self._served = self.server.served_model()
            rank_zero_info(f"{self.server.url} generates the outputs with {self._served}")
        super().setup(stage)

    def prepare_benchmarks(self, split: str) -> list[PreparedBenchmark]:
        """Return what the base does, with the server that is asked.

        Raises:
            InputError: A benchmark asks for more than text.
        """
        prepared = super().prepare_benchmarks(split)
        if self.server is None:
            return prepared
        for each in prepared:
            if each.benchmark.decoding is None:
                raise InputError(
                    f"data.server generates text, but {each.benchmark.name} in --data.evals needs the model's "
                    "likelihoods: leave one of them out"
                )
        return [replace(each, server=self.server, served=self._served) for each in prepared]
