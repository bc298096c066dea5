"""The base of all data modules: settings, rows by their use, batches, and the questions of benchmarks.

A data source subclasses `TextDataModule` and writes only `load`: which prompts and answers its rows have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from app.distributed.processes import is_first_process
from app.evaluation.benchmark import Benchmark, PreparedBenchmark
from app.models.batch import Batch
from app.models.protocols import TokenizedModel
from app.models.text_limits import context_length
from data_modules.contamination import count_shared
from data_modules.encoding import TextEncoder
from data_modules.label_tokens import label_token_ids
from data_modules.limits import check_encoded, check_max_length, check_packing, check_sizes
from data_modules.packing import PackedRows, collate_packed
from data_modules.questions import BenchmarkQuestions, question_loaders
from data_modules.row_checks import SPLITS, all_splits, check_rows, check_stage, splits_of
from data_modules.rows import EncodedRow, PaddedRows, TextRow
from data_modules.sampling import LengthGroupedSampler, check_position, initialization_share, subset
from data_modules.token_cache import cached

Collate = Callable[[Any], Batch]
Loaders = list[DataLoader[Any]]


class TextDataModule(LightningDataModule):
    """Serve a text-to-text task to training, initialization, validation and test.

    Args:
        path: Local file or folder of the data; null takes it from where it is published.
        max_length: Most tokens of an example: of prompt and answer (causal LM), or of the prompt
            (encoder-decoder). A longer prompt loses the end of its text, never its last line.
        batch_size: Training examples of a batch, or packed rows, on each process.
        eval_batch_size: Rows or questions of a validation or test batch, on each process.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        seed: Fixes the order of training, the subset `train_size` and the initialization rows. The
            rows held out for validation and test do not depend on it.
        train_size: Number of training rows to use, drawn by `seed`; null uses all.
        validation_size: Number of training rows set aside for validation.
        evals: Benchmarks to ask in validation and test, beside the rows.
        chat_template: Put every prompt into the tokenizer's chat template, as the user's message.
        long_prompts: What to do with a question that leaves no room for its answer in the model's context:
            `cut` drops its beginning, `refuse` stops before anything is asked.
        length_grouping: Make training batches of rows of similar length; false shuffles rows of any length.
        packing: Put training examples that do not see each other into rows of up to `max_length` tokens.
    """

    task_name = "text"
    label_words: tuple[str, ...] = ()  # of rows with classes, in the order of the classes
    splits: tuple[str, ...] = SPLITS  # what the source has rows for

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
        length_grouping: bool = True,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_size = train_size
        self.validation_size = validation_size
        self.chat_template = chat_template
        self.length_grouping = length_grouping
        self.packing = packing
        check_sizes(vars(self))
        self.evals = list(evals or [])
        self.questions = BenchmarkQuestions(self.evals, long_prompts)
        self.source = path or ""
        self.dropped_rows: dict[str, int] = {}
        self.cut_prompts: dict[str, int] = {}
        self.shared_questions: dict[str, int] = {}
        self._encoder: TextEncoder | None = None
        self._train_sampler: LengthGroupedSampler | None = None
        self._position: dict[str, int] = {}
        self._rows: dict[str, list[TextRow]] | None = None
        self._encoded: dict[str, list[EncodedRow]] = {}
        self._benchmarks: dict[str, list[PreparedBenchmark]] = {}

    def load(self) -> dict[str, list[TextRow]]:
        """Return the rows of "train", "validation" and "test"; each source writes this.

        A split that is left out has no rows: without validation rows training is not validated, without test
        rows only benchmarks can be tested.

        Raises:
            InputError: The data is missing or has another form.
        """
        raise NotImplementedError

    def read(self) -> None:
        """Read what the rows are made of, as far as that needs no tokenizer."""
        self.rows("train")

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool,
        context_length: int | None = None,
    ) -> None:
        """Set what depends on the model, see `TextEncoder`; `setup` takes it from the trainer's module."""
        encoder = TextEncoder(tokenizer, is_encoder_decoder, self.chat_template, context_length)
        if self._encoder not in (None, encoder):
            self._rows = None  # which rows are short enough may depend on it
            self._encoded.clear()
            self._benchmarks.clear()
        self._encoder = encoder

    @property
    def encoder(self) -> TextEncoder:
        """How the attached model reads text."""
        assert self._encoder is not None, "call attach() or setup() first"
        return self._encoder

    def prepare_data(self) -> None:
        """Download published data, once for all processes of a node."""
        if self.path is None and self.splits:
            self.read()

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the rows and questions of a stage, so that bad input stops the run here.

        Raises:
            InputError: The data has nothing for this stage, or cannot be used.
        """
        splits, model = splits_of(stage, self.splits), None
        about = (bool(self.evals), type(self).__name__)
        check_stage(stage, splits, *about)
        if splits:
            self.read()  # before the tokenizer, which may be a long download away
        if self.trainer is not None:
            model = cast(TokenizedModel, self.trainer.lightning_module)
            check_max_length(self.max_length if splits else 0, model)
            if self.packing and stage == "fit":
                check_packing(model)
            self.attach(model.tokenizer, model.is_encoder_decoder, context_length(model.config))
        check_stage(stage, list(filter(self.rows, splits)), *about)
        asked = self.prepare_benchmarks("validation" if stage in ("fit", "validate") else "test")
        encoded = {f"{self.task_name} {split}": self.encoded(split) for split in splits}
        self.encoder.warn_of_special_tokens({split: self.rows(split) for split in splits})
        self.label_token_ids()
        if model is not None:
            check_encoded(encoded, asked, model)
        if stage == "fit" and is_first_process():
            prompts = [row.prompt for row in self.rows("train")]
            self.shared_questions = count_shared(prompts, self.questions.prompts, self.task_name)

    def rows(self, split: str) -> list[TextRow]:
        """Return the rows of "train", "validation" or "test" as text."""
        if split not in self.splits:
            return []
        if self._rows is None:
            rows = all_splits(self.load(), type(self).__name__)
            for name, part in rows.items():
                check_rows(part, f"{self.task_name} {name}", self.label_words)
            if self.train_size is not None:
                rows["train"] = subset(rows["train"], self.train_size, self.seed)
            self._rows = rows
        return self._rows[split]

    def encoded(self, split: str) -> list[EncodedRow]:
        """Return the rows of a split as token ids; warns once of prompts that were cut."""
        if split not in self._encoded:
            rows, name = self.rows(split), f"{self.task_name} {split}"
            make = partial(self.encoder.rows, rows, self.max_length, name)
            identity = partial(self.encoder.identity, self.max_length)
            self._encoded[split], self.cut_prompts[split] = cached(rows, identity, make)
            if num_cut := self.cut_prompts[split]:
                rank_zero_warn(
                    f"{num_cut} of {len(rows)} prompts of {name} were cut to "
                    f"--data.max_length={self.max_length} tokens"
                )
        return self._encoded[split]

    def prepare_benchmarks(self, split: str) -> list[PreparedBenchmark]:
        """Return the benchmarks of a split with their questions encoded; see `BenchmarkQuestions.prepare`."""
        if split not in self._benchmarks:
            self._benchmarks[split] = self.questions.prepare(split, self.encoder, self.rows)
        return self._benchmarks[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return every training example once an epoch, in an order fixed by seed and epoch."""
        encoded, collate = self.encoded("train"), cast(Collate, self.encoder.collate)
        rows: PaddedRows | PackedRows = PaddedRows(encoded)
        if self.packing:
            rows = PackedRows(encoded, self.max_length, self.seed)
            collate = partial(collate_packed, collate=collate)
        size, place, workers = self.batch_size, self._rank_and_world_size(), self.num_workers
        self._train_sampler = sampler = LengthGroupedSampler(
            rows.lengths, size, True, self.seed, *place, self.length_grouping, **self._position
        )
        return DataLoader(rows, size, sampler=sampler, num_workers=workers, collate_fn=collate)

    def val_dataloader(self) -> Loaders:
        """Return the validation rows, longest first, and the benchmarks' questions."""
        return self._scored_loaders("validation")

    def test_dataloader(self) -> Loaders:
        """Return the test rows, longest first, and the benchmarks' questions."""
        return self._scored_loaders("test")

    def _scored_loaders(self, split: str) -> Loaders:
        size, place, loaders = self.eval_batch_size, self._rank_and_world_size(), Loaders()
        if self.rows(split):
            rows = PaddedRows(self.encoded(split))
            order = LengthGroupedSampler(rows.lengths, size, False, self.seed, *place)
            new = partial(DataLoader, num_workers=self.num_workers, collate_fn=self.encoder.collate)
            loaders.append(new(rows, size, sampler=order))
        return [*loaders, *question_loaders(self.prepare_benchmarks(split), size, *place)]

    def _rank_and_world_size(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

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
        return sampler.position(batches * self.batch_size * sampler.num_replicas)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let training go on behind the rows that an interrupted run has met.

        Raises:
            InputError: If today's batches cannot begin where that run stopped.
        """
        check_position(state_dict, self.batch_size, self._rank_and_world_size()[1])
        self._position = dict(state_dict)

    def gradient_batches(
        self,
        num_samples: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        drawn: bool = True,
        last: bool = False,
    ) -> list[Batch]:
        """Return this process's share of the initialization rows.

        Of all processes together they are `num_samples` of the training rows, drawn by `seed` or in order;
        `last` takes the end of either, not its beginning. Padding rows make all shares equally large.

        Raises:
            InputError: `num_samples` is not between 1 and the number of training rows.
        """
        rows, place = PaddedRows(self.encoded("train")), (rank, world_size)
        share = initialization_share(rows.lengths, num_samples, self.seed, *place, drawn, last)
        return [
            self.encoder.collate([rows[i] for i in share[start : start + micro_batch_size]])
            for start in range(0, len(share), micro_batch_size)
        ]

    def label_token_ids(self) -> list[int]:
        """Return the first token of each label word."""
        prompts = (row.prompt for split in SPLITS for row in self.rows(split))
        return label_token_ids(self.encoder, self.label_words, prompts, self.task_name)

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, how many there are, and what is asked, for the summary of a run."""
        return {
            "name": self.task_name,
            "rows": {split: len(self.rows(split)) for split in SPLITS},
            "source": self.source,
            "cut_prompts": dict(self.cut_prompts),
            "dropped_rows": dict(self.dropped_rows),
            "shared_questions": dict(self.shared_questions),
            "evals": [{"name": each.name, "version": each.version} for each in self.evals],
            "cut_questions": dict(self.questions.num_cut),
        }
