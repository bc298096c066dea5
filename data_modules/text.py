"""What every text-to-text task shares: loaders, the initialisation rows, label words, a description.

A data source subclasses `TextDataModule` and writes only `load`: where its rows come from, and what
prompt and answer they have.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from app.distributed.collectives import is_first_process
from app.evaluation.benchmark import Benchmark
from app.models.batch import Batch
from app.utils.errors import InputError
from data_modules.benchmark_data import BenchmarkDataModule
from data_modules.contamination import shared_questions
from data_modules.encoding import (
    EncodedRow,
    PaddedRows,
    TextRow,
    answer_prefix,
    collate,
    encode,
)
from data_modules.sampling import LengthGroupedSampler, draw, longest_first


class TextDataModule(BenchmarkDataModule):
    """Serve a text-to-text task to training, evaluation and the LoRA-One initialisation.

    Args:
        path: Local file or folder of the data; null takes it from where it is published.
        max_length: Most tokens of an example: of prompt and answer (causal LM), or of the prompt
            (encoder-decoder). A longer prompt loses the end of its text, never its last line.
        batch_size: Training examples of a batch, on each process.
        eval_batch_size: Examples or questions of a validation or test batch, on each process.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        seed: Fixes the order of training, the subset `train_size` and the initialisation rows. The
            rows held out for validation and test do not depend on it.
        train_size: Number of training rows to use, drawn by `seed`; null uses all.
        validation_size: Number of training rows set aside for validation.
        evals: Benchmarks to ask in validation and test, beside the rows.
        chat_template: Put every prompt into the tokenizer's chat template, as the user's message.
        long_prompts: What to do with a question that leaves no room for its answer in the model's context:
            `cut` drops its beginning, `refuse` stops before anything is asked.
    """

    def __init__(
        self,
        path: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        train_size: int | None = None,
        validation_size: int | None = None,
        evals: list[Benchmark] | None = None,
        chat_template: bool = False,
        long_prompts: Literal["cut", "refuse"] = "cut",
    ) -> None:
        super().__init__(evals, eval_batch_size, chat_template, long_prompts, seed)
        self.path = path
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_size = train_size
        self.validation_size = validation_size
        for name, least in (
            ("max_length", 1),
            ("batch_size", 1),
            ("num_workers", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"--data.{name}={getattr(self, name)}: expected at least {least}")
        self.source = path or ""
        self.dropped_rows: dict[str, int] = {}
        self.cut_prompts: dict[str, int] = {}
        self.shared_questions: dict[str, int] = {}
        self._train_sampler: LengthGroupedSampler | None = None
        self._position: dict[str, int] = {}
        self._rows: dict[str, list[TextRow]] | None = None
        self._encoded: dict[str, list[EncodedRow]] = {}

    def load(self) -> dict[str, list[TextRow]]:
        """Return the rows of "train", "validation" and "test"; each source writes this."""
        raise NotImplementedError

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool,
        context_length: int | None = None,
    ) -> None:
        """Set what depends on the model; `setup` does it from the trainer's module."""
        if tokenizer is not self.tokenizer or is_encoder_decoder != self.is_encoder_decoder:
            self._encoded.clear()
        super().attach(tokenizer, is_encoder_decoder, context_length)

    def prepare_data(self) -> None:
        """Download published data, once for all processes of a node."""
        if self.path is None:
            self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the rows and encode those of the stage, so that bad input stops the run here."""
        self.rows("train")  # before the tokenizer: it may be a long download away
        super().setup(stage)
        stages = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}
        for split in stages.get(stage or "", ["train", "validation", "test"]):
            self.encoded(split)
        self.label_token_ids()
        if stage == "fit" and is_first_process():
            self._look_for_questions()

    def _look_for_questions(self) -> None:
        """Warn if training rows are questions of a benchmark that is asked."""
        for name, prompts in self._prompts.items():
            rows = self.rows("train")
            count = shared_questions((row.prompt for row in rows), prompts)
            self.shared_questions[name] = count
            if count:
                rank_zero_warn(
                    f"{count:,} of {len(rows):,} training rows of {self.task_name} are questions of {name}, "
                    "word for word: its score tells what was learnt by heart"
                )

    def rows(self, split: str) -> list[TextRow]:
        """Return the rows of "train", "validation" or "test" as text."""
        if self._rows is None:
            rows = self.load()
            if self.train_size is not None:
                total = len(rows["train"])
                if not 1 <= self.train_size <= total:
                    raise InputError(f"--data.train_size={self.train_size}: expected 1 to {total}")
                chosen = draw(total, self.train_size, self.seed, "train_size")
                rows["train"] = [rows["train"][number] for number in sorted(chosen)]
            self._rows = rows
        return self._rows[split]

    def encoded(self, split: str) -> list[EncodedRow]:
        """Return the rows of a split as token ids; tells once how many prompts were cut."""
        if split not in self._encoded:
            name = f"{self.task_name} {split}"
            place = (self._tokenizer(), self.is_encoder_decoder, self.max_length, name)
            self._encoded[split], num_cut = encode(self.rows(split), *place, self.chat_template)
            self.cut_prompts[split] = num_cut
            if num_cut:
                rank_zero_warn(
                    f"{num_cut} of {len(self.rows(split))} prompts of {name} were cut to "
                    f"--data.max_length={self.max_length} tokens"
                )
        return self._encoded[split]

    def train_dataloader(self) -> DataLoader[EncodedRow]:
        """Return every training row once an epoch, in an order fixed by seed and epoch."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the validation rows, longest first, and the benchmarks' questions."""
        return [*self._evaluation_rows("validation"), *super().val_dataloader()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test rows, longest first, and the benchmarks' questions."""
        return [*self._evaluation_rows("test"), *super().test_dataloader()]

    def _evaluation_rows(self, split: str) -> list[DataLoader[Any]]:
        has_rows = bool(self.rows(split))  # a source of training rows alone has none to test
        return [self._loader(split, self.eval_batch_size, shuffle=False)] if has_rows else []

    def state_dict(self) -> dict[str, int]:
        """Return how far training is in the order of its rows.

        Returns:
            `epoch`; `done`, rows of its order that all processes together have met; `group_size`, which
            the order depends on. Empty before training.
        """
        sampler = self._train_sampler
        if sampler is None or self.trainer is None:
            return {}
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore
        done = batches * self.batch_size * sampler.num_replicas
        epoch = sampler.epoch
        if done >= len(sampler.lengths):
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "done": done, "group_size": sampler.group_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let training go on behind the rows that an interrupted run has met.

        Raises:
            InputError: If today's batches cannot begin where that run stopped.
        """
        world_size = self.trainer.world_size if self.trainer is not None else 1
        rows = self.batch_size * world_size
        if state_dict.get("done", 0) % rows:
            raise InputError(
                f"the checkpoint stands behind {state_dict['done']} rows of an epoch, which is no number "
                f"of whole batches of {rows} (data.batch_size={self.batch_size} on {world_size} "
                f"processes): set data.batch_size so that both together divide it, such as "
                f"{state_dict['group_size']} rows in all"
            )
        self._position = dict(state_dict)

    def gradient_batches(
        self, num_samples: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return this process's share of the LoRA-One initialisation rows.

        The rows are drawn once from the training rows by `seed`; neither the micro-batch size nor
        the number of processes changes which. Padding rows make all shares equally large, so that all
        processes run as many batches.

        Args:
            num_samples: Rows of all processes together.
            micro_batch_size: Rows of a batch.
            rank: This process.
            world_size: Number of processes.

        Raises:
            InputError: `num_samples` is not between 1 and the number of training rows.
        """
        rows = self.encoded("train")
        if not 1 <= num_samples <= len(rows):
            raise InputError(
                f"{num_samples} initialisation samples from {len(rows)} training rows: expected 1 "
                f"to {len(rows)}; change num_samples of the initialisation or --data.train_size"
            )
        if micro_batch_size < 1:
            raise InputError(
                f"the initialisation's micro_batch_size is {micro_batch_size}: expected 1 or more"
            )
        chosen = [
            rows[i] for i in sorted(draw(len(rows), num_samples, self.seed, "initialisation"))
        ]
        ordered = [chosen[i] for i in longest_first([len(row) for row in chosen])]
        ordered += [PaddedRows(chosen).padding] * (-num_samples % world_size)
        mine = ordered[rank::world_size]
        starts = range(0, len(mine), micro_batch_size)
        return [self._collate()(mine[start : start + micro_batch_size]) for start in starts]

    def label_token_ids(self) -> list[int]:
        """Return the first token of each label word, as it stands in an answer.

        Raises:
            InputError: Two words begin with the same token, so that it cannot tell them apart.
        """
        tokenizer = self._tokenizer()
        before = answer_prefix(tokenizer, self.is_encoder_decoder, self.chat_template)
        words_by_id: dict[int, str] = {}
        for word in self.label_words:
            first_id = tokenizer(before + word, add_special_tokens=False)["input_ids"][0]
            if first_id in words_by_id:
                raise InputError(
                    f"the labels {words_by_id[first_id]!r} and {word!r} of {self.task_name} begin "
                    f"with the same token {tokenizer.convert_ids_to_tokens(first_id)!r}: expected "
                    "words that differ there; change --model or --data"
                )
            words_by_id[first_id] = word
        return list(words_by_id)

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from and how many there are, for the summary of a run."""
        splits = ("train", "validation", "test")
        return {
            "name": self.task_name,
            "rows": {split: len(self.rows(split)) for split in splits},
            "source": self.source,
            "cut_prompts": dict(self.cut_prompts),
            "dropped_rows": dict(self.dropped_rows),
            "shared_questions": dict(self.shared_questions),
            **super().describe(),
        }

    def _collate(self) -> Callable[[Sequence[EncodedRow]], Batch]:
        pad_id = self._tokenizer().pad_token_id or 0
        return partial(collate, pad_id=pad_id, is_encoder_decoder=self.is_encoder_decoder)

    def _loader(self, split: str, batch_size: int, shuffle: bool) -> DataLoader[EncodedRow]:
        rows = self.encoded(split)
        lengths = [len(row) for row in rows]
        place = (batch_size, shuffle, self.seed, *self._rank_and_world_size())
        if split == "train":
            group_size, done = self._position.get("group_size"), self._position.get("done", 0)
            sampler = LengthGroupedSampler(lengths, *place, group_size, done)
            # Worker processes ask for the first rows before Lightning tells the sampler the epoch.
            sampler.set_epoch(self._position.get("epoch", 0))
            self._train_sampler = sampler
        else:
            sampler = LengthGroupedSampler(lengths, *place)
        return DataLoader(
            PaddedRows(rows),
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate(),
        )
