"""Questions of benchmarks, encoded and in batches; the part of every data module that asks them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from app.evaluation.benchmark import BENCHMARK, Benchmark, EncodedQuestion, PreparedBenchmark
from app.utils.errors import InputError
from app.utils.files import digest
from data_modules.encoding import answer_prefix, encode_prompts
from data_modules.sampling import SPLIT_SEED, LengthGroupedSampler, draw

QuestionBatch = dict[str, Any]


class BenchmarkDataModule(LightningDataModule):
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
    label_words: tuple[str, ...] = ()

    def __init__(
        self,
        evals: list[Benchmark] | None = None,
        eval_batch_size: int = 64,
        chat_template: bool = False,
        long_prompts: Literal["cut", "refuse"] = "cut",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if eval_batch_size < 1:
            raise InputError(f"--data.eval_batch_size={eval_batch_size}: expected at least 1")
        self.evals = list(evals or [])
        names = [benchmark.name for benchmark in self.evals]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise InputError(
                f"--data.evals lists {twice!r} twice: expected each benchmark once; remove one of them"
            )
        self.eval_batch_size = eval_batch_size
        self.chat_template = chat_template
        self.long_prompts = long_prompts
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.is_encoder_decoder = False
        self.context_length: int | None = None
        self.cut_questions: dict[str, int] = {}
        self._prepared: dict[str, list[PreparedBenchmark]] = {}
        self._prompts: dict[str, list[str]] = {}  # of all questions, asked or not

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool,
        context_length: int | None = None,
    ) -> None:
        """Set what depends on the model; `setup` does it from the trainer's module.

        Args:
            tokenizer: The model's.
            is_encoder_decoder: Whether the model reads a prompt and writes an answer apart.
            context_length: Positions that the model knows: tokens of prompt and answer together (causal), or
                of the prompt; None if there is no limit.
        """
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder
        self.context_length = context_length

    def setup(self, stage: str | None = None) -> None:
        """Check the benchmarks, read and encode their questions, so that bad input stops the run here."""
        if stage == "fit" and type(self) is BenchmarkDataModule:
            raise InputError(
                "data.class_path is BenchmarkDataModule, which has no rows to train on: name a data "
                "module with training rows, such as data_modules.gsm8k.Gsm8kDataModule"
            )
        if stage != "fit" and not self.evals and type(self) is BenchmarkDataModule:
            raise InputError(
                "--data.evals is empty: name a benchmark, as configs/eval/gsm8k.yaml does"
            )
        self._attach_to_module()
        for split in {"fit": ["validation"], "validate": ["validation"]}.get(stage or "", ["test"]):
            self.prepare_benchmarks(split)

    def _attach_to_module(self) -> None:
        if self.trainer is not None:
            module: Any = self.trainer.lightning_module
            self.attach(module.tokenizer, module.is_encoder_decoder, module.context_length)

    def prepare_benchmarks(self, split: str) -> list[PreparedBenchmark]:
        """Return the benchmarks with their questions encoded.

        Args:
            split: "validation" asks each benchmark's `validation_size` questions, "test" its `limit`.

        Raises:
            InputError: A benchmark cannot run here, its file is wrong, or a prompt is too long.
        """
        if split not in self._prepared:
            asked = [
                (e, e.validation_size if split == "validation" else e.limit) for e in self.evals
            ]
            for benchmark, size in asked:
                if size != 0:
                    benchmark.check()
            self._prepared[split] = [self._prepare(e, size) for e, size in asked if size != 0]
        return self._prepared[split]

    def _prepare(self, benchmark: Benchmark, size: int | None) -> PreparedBenchmark:
        questions = benchmark.load()
        self._prompts[benchmark.name] = [question.prompt for question in questions]
        if size is not None:
            if not 1 <= size <= len(questions):
                raise InputError(
                    f"{size} questions of {benchmark.name} are asked for, which has {len(questions)}: set "
                    "limit and validation_size of the benchmark to at most as many, or to null for all"
                )
            # The same questions for every seed of a run.
            chosen = sorted(draw(len(questions), size, SPLIT_SEED, benchmark.name))
            questions = [questions[i] for i in chosen]
        tokenizer = self._tokenizer()
        prompts = encode_prompts(
            [question.prompt for question in questions],
            tokenizer,
            self.is_encoder_decoder,
            self.chat_template,
        )
        choices: list[list[int]] = []
        if benchmark.choices:
            chat = self.chat_template
            before = "" if chat else answer_prefix(tokenizer, self.is_encoder_decoder)
            choices = [
                tokenizer(before + choice.strip(), add_special_tokens=False)["input_ids"]
                for choice in benchmark.choices
            ]
        room = self._room(benchmark, choices)
        prompts = [self._fit(ids, room, benchmark.name) for ids in prompts]
        mark = f"{self.chat_template} {self.context_length}"
        encoded = [
            EncodedQuestion(question, ids, digest(f"{mark} {question.prompt}"))
            for question, ids in zip(questions, prompts, strict=True)
        ]
        if self.cut_questions.get(benchmark.name):
            rank_zero_warn(
                f"{self.cut_questions[benchmark.name]} of {len(questions)} prompts of {benchmark.name} lost "
                f"their beginning: the model's context has {self.context_length} tokens "
                "(--data.long_prompts=refuse stops instead)"
            )
        return PreparedBenchmark(benchmark, encoded, choices)

    def _room(self, benchmark: Benchmark, choices: Sequence[Sequence[int]]) -> int | None:
        """Return the most tokens of a prompt, or None if there is no limit."""
        if self.context_length is None:
            return None
        if self.is_encoder_decoder:
            return self.context_length
        answer = max(map(len, choices), default=0)
        if benchmark.decoding is not None:
            answer = benchmark.decoding.max_new_tokens
        if answer >= self.context_length:
            raise InputError(
                f"max_new_tokens={answer} of {benchmark.name} fill the model's context of "
                f"{self.context_length} tokens: expected fewer, to leave room for the question"
            )
        return self.context_length - answer

    def _fit(self, ids: list[int], room: int | None, name: str) -> list[int]:
        if room is None or len(ids) <= room:
            return ids
        if self.long_prompts == "refuse":
            raise InputError(
                f"a prompt of {name} has {len(ids)} tokens, but the model's context has room for {room} "
                "beside the answer: ask with fewer shots, lower max_new_tokens, or let prompts "
                "lose their beginning with --data.long_prompts=cut"
            )
        self.cut_questions[name] = self.cut_questions.get(name, 0) + 1
        bos = ids[:1] if ids[0] == self._tokenizer().bos_token_id else []
        return bos + ids[len(ids) - room + len(bos) :]

    def label_token_ids(self) -> list[int]:
        """Return the first token of each label word: none, since questions have no classes."""
        return []

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return batches of each benchmark's validation questions."""
        return self._question_loaders("validation")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return batches of each benchmark's test questions."""
        return self._question_loaders("test")

    def _question_loaders(self, split: str) -> list[DataLoader[Any]]:
        loaders: list[DataLoader[Any]] = []
        for number, prepared in enumerate(self.prepare_benchmarks(split)):
            lengths = [len(question) for question in prepared.questions]
            if prepared.choice_ids:
                # In the file's order neighbours begin alike (MMLU's subjects), which is read once.
                lengths = [1] * len(lengths)
            sampler = LengthGroupedSampler(
                lengths, self.eval_batch_size, False, 0, *self._rank_and_world_size()
            )
            places = _Places(len(lengths))
            loaders.append(
                DataLoader(
                    places, self.eval_batch_size, sampler=sampler, collate_fn=_Collate(number)
                )
            )
        return loaders

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RuntimeError(
                "no tokenizer: call attach(tokenizer, is_encoder_decoder) or setup() first"
            )
        return self.tokenizer

    def describe(self) -> dict[str, Any]:
        """Return what is asked, for the summary of a run."""
        return {
            "evals": [
                {"name": benchmark.name, "version": benchmark.version} for benchmark in self.evals
            ],
            "cut_questions": dict(self.cut_questions),
        }


class _Places(Dataset[int]):
    """Places of questions, as themselves: the questions stay where they are."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        return place


class _Collate:
    """Makes a batch of places."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, places: Sequence[int]) -> QuestionBatch:
        return {BENCHMARK: self.number, "index": torch.tensor(places)}
