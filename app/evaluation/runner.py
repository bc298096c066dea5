"""Ask a model the questions of a benchmark, batch by batch, and keep answers and scores."""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.distributed.collectives import sum_over_processes
from app.distributed.processes import is_first_process, world_size
from app.evaluation.answers import Answer, AnswersFile
from app.evaluation.benchmark import Benchmark, EncodedQuestion, PreparedBenchmark
from app.evaluation.metrics import MeanScores
from app.evaluation.server_requests import ServerRequests
from app.models.generation import generate
from app.models.likelihood import choice_log_likelihoods
from app.models.protocols import ScoredModel

HASHED = 2**18  # values of a weight that its digest reads
# Settings of a benchmark that say which questions are asked, and change no answer.
NOT_IN_IDENTITY = ("path", "limit", "validation_size")


def trained_weights_digest(model: nn.Module) -> str:
    """Return a short name of the values of all trainable weights; "none" if there are none.

    Of a weight with more than HASHED values only so many are read, evenly spread: every training step
    changes them all.
    """
    weights, any_trained = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = parameter.detach().flatten()
            some = values[:: -(-values.numel() // HASHED)].float().cpu().contiguous()
            weights.update(name.encode() + b"\0" + some.numpy().tobytes())
            any_trained = True
    return weights.hexdigest()[:12] if any_trained else "none"


def benchmark_identity(benchmark: Benchmark) -> dict[str, Any]:
    """Return what answers depend on of a benchmark: name, version and settings, as JSON data."""
    settings: dict[str, Any] = {
        name: str(value)
        for name, value in vars(benchmark).items()
        if name not in NOT_IN_IDENTITY and not name.startswith("_")
    }
    if benchmark.decoding is not None:
        settings["decoding"] = asdict(benchmark.decoding)
    return {"name": benchmark.name, "version": benchmark.version, "settings": settings}


class BenchmarkRunner:
    """Ask one benchmark's questions once and add the scores up over all processes.

    Args:
        folder: Where answers are kept; None keeps none.
        identity: What answers depend on beside the benchmark: the model and its weights. JSON data.
        together: Whether the processes must run the model in step, since it is sharded.
    """

    def __init__(
        self,
        module: ScoredModel,
        prepared: PreparedBenchmark,
        folder: Path | None,
        identity: Mapping[str, str | None],
        together: bool,
    ) -> None:
        self.module = module
        self.prepared = prepared
        self.together = together
        self.name = prepared.benchmark.name
        questions = [encoded.question for encoded in prepared.questions]
        self.means = MeanScores(prepared.benchmark.score_names(questions))
        self.tokens = 0  # that this process has generated, or read where choices are compared
        self.seconds = 0.0
        self.asked = self.known = 0
        self.task_scores: dict[str, float] = {}  # of a benchmark that runs the model itself
        self.scores: dict[str, float] = {}
        self.counts: dict[str, float | None] = {}
        self.requests: ServerRequests | None = None
        if prepared.server is not None and prepared.benchmark.decoding is not None:
            served = str(prepared.served)
            self.requests = ServerRequests(prepared.server, served, prepared.benchmark.decoding)
            identity = {"served": served, "api": prepared.server.api}
        self.identity = {**benchmark_identity(prepared.benchmark), **identity}
        self.file = None if folder is None else AnswersFile(folder, self.name, self.identity)

    def ask(self, index: Sequence[int]) -> None:
        """Ask the questions of one batch that have no answer yet, judge and keep the answers.

        `index` (B,) holds places in the benchmark's questions; -1 is a padding row, which is not asked.
        """
        if self.prepared.benchmark.runs_model:
            for i in index:
                self._run_task(self.prepared.questions[i])
            return
        unanswered = []
        for encoded in (self.prepared.questions[i] for i in index if i >= 0):
            scores = self.file.scores_before(encoded) if self.file else None
            if scores is None:
                unanswered.append(encoded)
            else:
                self.known += 1
                self.means.update(scores)
        if self.requests is not None:
            self._keep(self.requests.ask(unanswered))
            return
        if not unanswered and not self.together:
            return
        start = time.perf_counter()
        answers = (
            self._compare(unanswered) if self.prepared.choice_ids else self._generate(unanswered)
        )
        self.seconds += time.perf_counter() - start
        self._judge(unanswered, answers)

    def _keep(self, answered: Iterable[tuple[EncodedQuestion, Answer]]) -> None:
        """Judge and keep a server's answers, each as it comes."""
        start = time.perf_counter()
        for encoded, answer in answered:
            self.tokens += sum(answer["tokens"])
            self._judge([encoded], [answer])
        self.seconds += time.perf_counter() - start

    def _run_task(self, task: EncodedQuestion) -> None:
        """Let the benchmark run the model on a task, unless that has an answer; on all processes together."""
        benchmark, prepared = self.prepared.benchmark, self.prepared
        scores = self.file.scores_before(task) if self.file else None
        self.known += scores is not None and is_first_process()
        if scores is None:
            size, chat_template = prepared.size, prepared.chat_template
            answer = benchmark.run(self.module, task.question, size, chat_template)
            scores = benchmark.score(task.question, answer["outputs"])
            if is_first_process():
                self.asked += 1
                if self.file is not None:
                    named = {"key": task.question.key, "prompt_hash": task.prompt_hash}
                    self.file.add([{**named, **answer, "scores": scores}])
        self.task_scores |= scores

    def _generate(self, asked: Sequence[EncodedQuestion]) -> list[Answer]:
        decoding = self.prepared.benchmark.decoding
        assert decoding is not None
        outputs = generate(
            self.module.model,
            self.module.base,
            self.module.tokenizer,
            [encoded.prompt_ids for encoded in asked],
            [encoded.question.key for encoded in asked],
            decoding,
            together=self.together,
        )
        self.tokens += sum(text.num_tokens for texts in outputs for text in texts)
        return [
            {
                "outputs": [text.text for text in texts],
                "tokens": [text.num_tokens for text in texts],
                "finished": [text.finished for text in texts],
            }
            for texts in outputs
        ]

    def _compare(self, asked: Sequence[EncodedQuestion]) -> list[Answer]:
        choices = self.prepared.benchmark.choices
        log_likelihoods = choice_log_likelihoods(
            self.module.model,
            self.module.base,
            [encoded.prompt_ids for encoded in asked],
            self.prepared.choice_ids,
            together=self.together,
        )
        self.tokens += sum(len(encoded) for encoded in asked)
        return [
            {"outputs": [choices[int(row.argmax())]], "log_likelihoods": row.tolist()}
            for row in log_likelihoods
        ]

    def _judge(self, asked: Sequence[EncodedQuestion], answers: Sequence[Answer]) -> None:
        # Code is judged in processes of its own, with a limit of wall time: no more than there are cores.
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // neighbours)) as pool:
            questions = [encoded.question for encoded in asked]
            outputs = [answer["outputs"] for answer in answers]
            judged = list(pool.map(self.prepared.benchmark.score, questions, outputs))
        self.asked += len(asked)
        for scores in judged:
            self.means.update(scores)
        if self.file is not None and asked:
            rows = []
            for e, answer, scores in zip(asked, answers, judged, strict=True):
                named = {"key": e.question.key, "prompt_hash": e.prompt_hash}
                if isinstance(e.question.reference, str):  # to read beside the output
                    named |= {"prompt": e.question.prompt, "reference": e.question.reference}
                rows.append({**named, **answer, "scores": scores})
            self.file.add(rows)

    def finish(self) -> dict[str, float]:
        """Join the answers of all processes and return the scores, the same on every process."""
        if self.requests is not None:
            self._keep(self.requests.rest())
        if self.file is not None:
            self.file.join({q.question.key: i for i, q in enumerate(self.prepared.questions)})
        device = self.module.device
        self.scores = self.prepared.benchmark.combine(
            self.task_scores or self.means.compute(device)
        )
        counts = torch.tensor([self.asked, self.known, self.tokens], device=device)
        asked, known, tokens = sum_over_processes(counts).tolist()
        self.counts = {
            "questions": asked + known,
            "answered_before": known,
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
        }
        return self.scores
