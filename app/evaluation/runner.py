"""Ask a model the questions of a benchmark, batch by batch, and keep answers and scores."""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.distributed.collectives import sum_over_processes, world_size
from app.evaluation.answers import Answer, AnswersFile
from app.evaluation.benchmark import EncodedQuestion, PreparedBenchmark
from app.evaluation.metrics import MeanScores
from app.models.generation import generate
from app.models.likelihood import choice_log_likelihoods

HASHED = 2**18
"""Values of a weight that its digest reads."""
NOT_WHAT_IS_ASKED = (
    "path",
    "limit",
    "validation_size",
)  # which rows, not what an answer depends on


def trained_weights_digest(model: nn.Module) -> str:
    """Return a short name of the values of all trainable weights; "none" if there are none.

    Of a weight with more than HASHED values only so many are read, evenly spread: every training step
    changes them all.
    """
    found, any_trained = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = parameter.detach().flatten()
            some = values[:: -(-values.numel() // HASHED)].float().cpu().contiguous()
            found.update(name.encode() + b"\0" + some.numpy().tobytes())
            any_trained = True
    return found.hexdigest()[:12] if any_trained else "none"


class BenchmarkRunner:
    """Asks one benchmark's questions once and adds the scores up over all processes.

    Args:
        prepared: Benchmark and questions.
        folder: Where answers are kept; None keeps none.
        identity: What answers depend on beside the benchmark: the model and its weights. JSON data.
        device: Where the processes add the scores up.
    """

    def __init__(
        self,
        prepared: PreparedBenchmark,
        folder: Path | None,
        identity: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.prepared = prepared
        self.metric = MeanScores(
            prepared.benchmark.score_names([q.question for q in prepared.questions])
        ).to(device)
        self.tokens = 0  # that this process has generated, or read where choices are compared
        self.seconds = 0.0
        self.asked = self.known = 0
        self.scores: dict[str, float] = {}
        self.counts: dict[str, float | None] = {}
        self.identity = {**self._own_identity(), **identity}
        self.file = None if folder is None else AnswersFile(folder, self.name, self.identity)

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self.prepared.benchmark.name

    def _own_identity(self) -> dict[str, Any]:
        benchmark = self.prepared.benchmark
        settings = {k: v for k, v in vars(benchmark).items() if k not in NOT_WHAT_IS_ASKED}
        public: dict[str, Any] = {k: str(v) for k, v in settings.items() if not k.startswith("_")}
        told = {"name": self.name, "version": benchmark.version}
        if benchmark.decoding is not None:
            public["decoding"] = asdict(benchmark.decoding)
        return {**told, "settings": public}

    def ask(self, module: Any, index: Sequence[int], together: bool) -> None:
        """Ask the questions of one batch that have no answer yet, judge and keep the answers.

        Args:
            module: The `LoraModule`, in evaluation mode.
            index: (B,) places in the benchmark's questions; -1 is a padding row, which nobody asks.
            together: Whether the processes must run the model in step, since it is sharded.
        """
        questions = [self.prepared.questions[i] for i in index if i >= 0]
        to_ask = []
        for encoded in questions:
            before = self._scores_before(encoded)
            if before is None:
                to_ask.append(encoded)
            else:
                self.known += 1
                self.metric.update(before)
        if not to_ask and not together:
            return
        start = time.perf_counter()
        way = self._compare if self.prepared.choice_ids else self._write
        answers = way(module, to_ask, together)
        self.seconds += time.perf_counter() - start
        self._judge(to_ask, answers)

    def _scores_before(self, encoded: EncodedQuestion) -> dict[str, float] | None:
        if self.file is None:
            return None
        return self.file.scores_before(encoded.question.key, encoded.prompt_hash)

    def _write(self, module: Any, asked: Sequence[EncodedQuestion], together: bool) -> list[Answer]:
        benchmark = self.prepared.benchmark
        assert benchmark.decoding is not None
        written = generate(
            module.model,
            module.base,
            module.tokenizer,
            [encoded.prompt_ids for encoded in asked],
            [encoded.question.key for encoded in asked],
            benchmark.decoding,
            together=together,
        )
        self.tokens += sum(text.num_tokens for texts in written for text in texts)
        return [
            {
                "outputs": [text.text for text in texts],
                "tokens": [text.num_tokens for text in texts],
                "finished": [text.finished for text in texts],
            }
            for texts in written
        ]

    def _compare(
        self, module: Any, asked: Sequence[EncodedQuestion], together: bool
    ) -> list[Answer]:
        benchmark = self.prepared.benchmark
        found = choice_log_likelihoods(
            module.model,
            module.base,
            [encoded.prompt_ids for encoded in asked],
            self.prepared.choice_ids,
            together=together,
        )
        self.tokens += sum(len(encoded) for encoded in asked)
        return [
            {"outputs": [benchmark.choices[int(row.argmax())]], "log_likelihoods": row.tolist()}
            for row in found
        ]

    def _judge(self, asked: Sequence[EncodedQuestion], answers: Sequence[Answer]) -> None:
        # Code is judged in processes of its own, with a limit of wall time: no more than there are cores.
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // neighbours)) as pool:
            outputs = [answer["outputs"] for answer in answers]
            scores = list(
                pool.map(self.prepared.benchmark.score, [e.question for e in asked], outputs)
            )
        self.asked += len(asked)
        whole = []
        for encoded, answer, found in zip(asked, answers, scores, strict=True):
            self.metric.update(found)
            named = {"key": encoded.question.key, "prompt_hash": encoded.prompt_hash}
            whole.append({**named, **answer, "scores": found})
        if self.file is not None and whole:
            self.file.add(whole)

    def finish(self) -> dict[str, Tensor]:
        """Join the answers of all processes and return the scores, the same on every process."""
        if self.file is not None:
            self.file.join({q.question.key: i for i, q in enumerate(self.prepared.questions)})
        means = {name: float(value) for name, value in self.metric.compute().items()}
        self.scores = self.prepared.benchmark.combine(means)
        told = torch.tensor([self.asked, self.known, self.tokens], device=self.metric.device)
        asked, known, tokens = sum_over_processes(told).tolist()
        self.counts = {
            "questions": asked + known,
            "answered_before": known,
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
        }
        return {f"{self.name}/{k}": torch.tensor(v) for k, v in self.scores.items()}

    def result(self) -> tuple[str, dict[str, Any]]:
        """Return the name of the file of answers, and scores and counts as JSON data; after `finish`."""
        told = {**self.identity, "scores": self.scores}
        return self.file.stem if self.file else self.name, {**told, **self.counts}
