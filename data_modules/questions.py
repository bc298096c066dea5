"""Choose, encode and batch the questions of a data module's benchmarks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from app.evaluation.benchmark import (
    BENCHMARK,
    Benchmark,
    EncodedQuestion,
    PreparedBenchmark,
    Question,
)
from app.models.batch import Batch
from app.utils.errors import InputError
from app.utils.files import digest
from data_modules.chat_encoding import ChatEncoder
from data_modules.encoding import TextEncoder
from data_modules.rows import TextRow
from data_modules.sampling import SPLIT_SEED, LengthGroupedSampler, draw


class BenchmarkQuestions:
    """Prepare benchmarks for a model, and make batches of their questions.

    Of a question that leaves no room for its answer in the model's context, `long_prompts` says to `cut` the
    beginning, or to `refuse`.

    Raises:
        InputError: A benchmark is listed twice.
    """

    def __init__(
        self, benchmarks: Sequence[Benchmark], long_prompts: Literal["cut", "refuse"]
    ) -> None:
        names = [benchmark.name for benchmark in benchmarks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise InputError(
                f"--data.evals lists {twice!r} twice: expected each benchmark once; remove one of them"
            )
        self.benchmarks = benchmarks
        self.long_prompts = long_prompts
        self.prompts: dict[str, list[str]] = {}  # of each prepared benchmark, asked or not
        self.num_cut: dict[str, int] = {}  # prompts of each benchmark that lost their beginning

    def prepare(
        self,
        split: str,
        encoder: TextEncoder,
        rows: Callable[[str], Sequence[TextRow]] = lambda split: (),
    ) -> list[PreparedBenchmark]:
        """Read, choose and encode the questions of a split, of the benchmarks that have any there.

        "validation" asks each benchmark's `validation_size` questions, "test" its `limit`. `rows` are the data
        module's of each split.

        Raises:
            InputError: A benchmark cannot run here, its file is wrong, or a prompt is too long.
        """
        sizes = [b.validation_size if split == "validation" else b.limit for b in self.benchmarks]
        asked = [(b, size) for b, size in zip(self.benchmarks, sizes, strict=True) if size != 0]
        for number, (benchmark, size) in enumerate(asked):
            benchmark.check()
            if benchmark.asks_rows:
                own = rows(split) or rows("validation")
                benchmark.take_rows(own)
                asked[number] = (benchmark, size and min(size, len(own)))
        return [self._prepare(benchmark, size, encoder) for benchmark, size in asked]

    def _prepare(
        self, benchmark: Benchmark, size: int | None, encoder: TextEncoder
    ) -> PreparedBenchmark:
        questions = benchmark.load()
        if benchmark.runs_model:
            about = f"{size} {encoder.chat_template}"
            tasks = [EncodedQuestion(q, (), digest(f"{about} {q.reference}")) for q in questions]
            return PreparedBenchmark(
                benchmark, tasks, (), size=size, chat_template=encoder.chat_template
            )
        self.prompts[benchmark.name] = [question.prompt for question in questions]
        if size is not None:
            if not 1 <= size <= len(questions):
                raise InputError(
                    f"{size} questions of {benchmark.name} are asked for, which has {len(questions)}: set "
                    "limit and validation_size of the benchmark to at most as many, or to null for all"
                )
            # The same questions for every seed of a run.
            chosen = sorted(draw(len(questions), size, SPLIT_SEED, benchmark.name))
            questions = [questions[i] for i in chosen]
        prefix = encoder.answer_prefix(*(question.prompt for question in questions[:1]))
        choices = [
            encoder.tokenizer(prefix + choice.strip(), add_special_tokens=False)["input_ids"]
            for choice in benchmark.choices
        ]
        prompts = _token_ids(questions, encoder)
        prompts = self._shortened(prompts, benchmark, choices, encoder)
        # Of one's own data the answers may be corrected, too.
        references = [question.reference if benchmark.asks_rows else "" for question in questions]
        encoded = [
            EncodedQuestion(question, ids, digest(" ".join(map(str, ids)) + reference))
            for question, ids, reference in zip(questions, prompts, references, strict=True)
        ]
        return PreparedBenchmark(benchmark, encoded, choices)

    def _shortened(
        self,
        prompts: list[list[int]],
        benchmark: Benchmark,
        choices: Sequence[Sequence[int]],
        encoder: TextEncoder,
    ) -> list[list[int]]:
        """Return the prompts, without the beginning of those that leave no room for an answer."""
        name, context = benchmark.name, encoder.context_length
        if context is None:
            return prompts
        room = context
        if not encoder.is_encoder_decoder:
            decoding = benchmark.decoding
            answer = max(map(len, choices)) if decoding is None else decoding.max_new_tokens
            if answer >= context:
                raise InputError(
                    f"max_new_tokens={answer} of {name} fill the model's context of {context} tokens: "
                    "expected fewer, to leave room for the question"
                )
            room = context - answer
        longest = max(map(len, prompts))
        if longest > room and self.long_prompts == "refuse":
            raise InputError(
                f"a prompt of {name} has {longest} tokens, but the model's context has room for {room} "
                "beside the answer: ask with fewer shots, lower max_new_tokens, or let prompts "
                "lose their beginning with --data.long_prompts=cut"
            )
        if longest > room:
            self.num_cut[name] = sum(len(ids) > room for ids in prompts)
            rank_zero_warn(
                f"{self.num_cut[name]} of {len(prompts)} prompts of {name} lost their beginning: the model's "
                f"context has {context} tokens (--data.long_prompts=refuse stops instead)"
            )
        return [ids if len(ids) <= room else encoder.last_tokens(ids, room) for ids in prompts]


def _token_ids(questions: Sequence[Question], encoder: TextEncoder) -> list[list[int]]:
    """Return what the model reads of each question, up to where its output begins."""
    if not any(question.turns for question in questions):
        return encoder.prompts([question.prompt for question in questions])
    prompts, chat = [], ChatEncoder(encoder.tokenizer)
    for question in questions:
        row = chat.row(question.turns, 0, question.key)
        begin = row.read_only[-1][1] if row.read_only else 0  # of the last answer
        prompts.append([*row.prompt_ids, *row.answer_ids[:begin]])
    return prompts


def question_loaders(
    benchmarks: Sequence[PreparedBenchmark], batch_size: int, rank: int, world_size: int
) -> list[DataLoader[int]]:
    """Return a loader for each benchmark, of batches with its number as `BENCHMARK` and places of questions.

    `batch_size` counts the questions of a batch on each process.
    """
    loaders = []
    for number, prepared in enumerate(benchmarks):
        lengths = [len(question) for question in prepared.questions]
        if prepared.choice_ids:
            # In the file's order neighbours begin alike (MMLU's subjects), which is read once.
            lengths = [1] * len(lengths)
        collate, places = partial(_collate, number), _Places(len(lengths))
        if prepared.benchmark.runs_model:  # on all processes together, task by task
            loaders.append(DataLoader(places, 1, collate_fn=collate))
            continue
        sampler = LengthGroupedSampler(lengths, batch_size, False, 0, rank, world_size)
        loaders.append(DataLoader(places, batch_size, sampler=sampler, collate_fn=collate))
    return loaders


class _Places(Dataset[int]):
    """Places of questions, as themselves, padding too: the questions stay where they are."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        return place


def _collate(number: int, places: Sequence[int]) -> Batch:
    return {BENCHMARK: torch.tensor(number), "index": torch.tensor(places)}
