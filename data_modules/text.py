"""From (prompt, answer) rows to batches: tokenise, cut, group by length, collate.

A data source subclasses `TextDataModule` and writes only `load`: where its rows come from, and what
prompt and answer they have. Everything that all text-to-text tasks share is here.
"""

import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from app.errors import InputError

Batch = dict[str, Tensor]

IGNORED_LABEL = -100
CHUNK_ROWS = 1024  # tokenised in one call: fast, without the token strings of a corpus in memory
SPLIT_SEED = 0  # rows held out do not depend on `seed`: runs with other seeds meet the same ones


@dataclass(frozen=True)
class TextRow:
    """One example as text: what the model reads, what it shall answer, and the answer's class."""

    prompt: str
    answer: str
    target: int


@dataclass(frozen=True)
class EncodedRow:
    """One example as token ids; those of the answer end with EOS and are the supervised ones."""

    prompt_ids: "array[int]"
    answer_ids: "array[int]"
    index: int
    target: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def answer_prefix(tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> str:
    """Return what goes before an answer so that its first token is the one used inside a text.

    A causal LM continues the prompt: "result:" + " positive", without the space where the tokenizer
    marks the start of a word by itself (SentencePiece). A decoder begins with the answer.
    Differs: the LoRA-One code has the space in the prompt ("result: " + "positive"), where BPE over
    bytes makes of it a token of its own, which is rare before a word.
    """
    if is_encoder_decoder:
        return ""
    first_id = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    return "" if str(tokenizer.convert_ids_to_tokens(first_id)).startswith(("▁", "Ġ")) else " "


def encode(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    max_length: int,
    name: str = "data",
) -> tuple[list[EncodedRow], int]:
    """Tokenise prompts and answers apart, and cut the prompts that are too long.

        causal:          [BOS] prompt + answer + EOS    BOS only where the tokenizer adds it unasked
        encoder-decoder: prompt with the tokenizer's own special tokens, and answer + EOS

    A cut prompt loses the end of its text, never its last line ("result:"); no answer is ever cut.

    Args:
        rows: The examples; spaces at the end of a prompt are dropped.
        tokenizer: A fast tokenizer with an EOS token.
        is_encoder_decoder: Which of the two forms to build.
        max_length: Most tokens of prompt and answer (causal), or of the prompt (encoder-decoder).
        name: What messages call these rows.

    Returns:
        The encoded rows in the order of `rows`, and how many prompts were cut.

    Raises:
        InputError: An empty answer, a tokenizer without EOS, or no room for any text of a prompt.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, which ends every answer: "
            "expected a model whose tokenizer has one; change --model"
        )
    before = answer_prefix(tokenizer, is_encoder_decoder)
    first_id = tokenizer("a")["input_ids"][0]
    bos = [first_id] if first_id == tokenizer.bos_token_id and not is_encoder_decoder else []
    encoded: list[EncodedRow] = []
    num_cut = 0
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        prompts = [row.prompt.rstrip(" ") for row in chunk]
        prompt_ids = tokenizer(prompts, add_special_tokens=is_encoder_decoder)["input_ids"]
        answers = [before + row.answer for row in chunk]
        answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        for offset, row in enumerate(chunk):
            where = f"row {start + offset} of {name}"
            ids, supervised = prompt_ids[offset], [*answer_ids[offset], tokenizer.eos_token_id]
            if not row.answer.strip() or len(supervised) == 1:
                raise InputError(
                    f"{where} has the answer {row.answer!r}, which gives no token to learn: "
                    "expected a word; correct the data (--data.path)"
                )
            room = max_length - len(bos) - (0 if is_encoder_decoder else len(supervised))
            if len(ids) > room:
                ids = _cut_prompt(prompts[offset], tokenizer, is_encoder_decoder, room)
                num_cut += 1
            if not ids:
                raise InputError(
                    f"--data.max_length={max_length} has no room for any text of {where} beside "
                    "its last line and its answer: expected more; raise --data.max_length"
                )
            prompt, answer = array("i", bos + ids), array("i", supervised)
            encoded.append(EncodedRow(prompt, answer, start + offset, row.target))
    return encoded, num_cut


def _cut_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, special: bool, room: int
) -> list[int]:
    """Cut the end of the text before the last line until all fits; [] if no text is left."""
    text, newline, last_line = prompt.rpartition("\n")
    if not newline:
        text, last_line = prompt, ""
    while text:
        shorter = text + newline + last_line
        encoding = tokenizer(shorter, add_special_tokens=special, return_offsets_mapping=True)
        excess = len(encoding["input_ids"]) - room
        if excess <= 0:
            return list(encoding["input_ids"])
        starts = [begin for begin, end in encoding["offset_mapping"] if begin < end <= len(text)]
        text = text[: starts[-excess]].rstrip() if excess < len(starts) else ""
    return []


def collate(rows: Sequence[EncodedRow], pad_id: int, is_encoder_decoder: bool) -> Batch:
    """Pad encoded rows to one batch.

    Args:
        rows: The rows of the batch.
        pad_id: Id written at padded inputs; it may equal EOS, since `attention_mask` tells padding.
        is_encoder_decoder: Whether the answer is a sequence of its own.

    Returns:
        `input_ids` and `attention_mask` (B, T), `labels` (B, L) with -100 where nothing is learnt
        (causal: L == T, unshifted), `index` and `target` (B,); all int64, padded at the right.
    """
    inputs, labels = [], []
    for row in rows:
        prompt, answer = row.prompt_ids.tolist(), row.answer_ids.tolist()
        inputs.append(prompt if is_encoder_decoder else prompt + answer)
        labels.append(answer if is_encoder_decoder else [IGNORED_LABEL] * len(prompt) + answer)
    return {
        "input_ids": _pad(inputs, pad_id),
        "attention_mask": _pad([[1] * len(ids) for ids in inputs], 0),
        "labels": _pad(labels, IGNORED_LABEL),
        "index": torch.tensor([row.index for row in rows]),
        "target": torch.tensor([row.target for row in rows]),
    }


def _pad(sequences: list[list[int]], value: int) -> Tensor:
    """Stack lists of different lengths, filled up at the right."""
    longest = max(map(len, sequences))
    return torch.tensor([ids + [value] * (longest - len(ids)) for ids in sequences])


class LengthGroupedSampler(DistributedSampler):
    """Order rows so that batches hold rows of similar length, the longest first.

    One process meets every row exactly once an epoch. Of several, each takes every world_size-th
    row of the same order, which keeps the global batches; at most world_size - 1 rows are met
    twice, so that all take as many steps. With `shuffle` off, rows are sorted by length. Lightning
    leaves a `DistributedSampler` in place and tells it the epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(lengths, world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.global_batch_size = batch_size * world_size

    def __iter__(self) -> Iterator[int]:
        order = self._shuffled() if self.shuffle else longest_first(self.lengths)
        order += islice(cycle(order[:]), -len(order) % self.num_replicas)
        return iter(order[self.rank :: self.num_replicas])

    def _shuffled(self) -> list[int]:
        """Group by length, then shuffle the batches but the longest and an incomplete last one."""
        size = self.global_batch_size
        generator = _generator(self.seed, f"epoch {self.epoch}")
        rows = get_length_grouped_indices(self.lengths, size, generator=generator)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        num_full = max(len(rows) // size, 1)
        moved = torch.randperm(num_full - 1, generator=generator) + 1
        batches = [batches[0], *(batches[i] for i in moved), *batches[num_full:]]
        return [row for batch in batches for row in batch]


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return row numbers by falling length, equal ones in their order."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def draw(num_rows: int, size: int, seed: int, purpose: str) -> list[int]:
    """Draw row numbers for a purpose; a smaller draw is part of a larger one."""
    return torch.randperm(num_rows, generator=_generator(seed, purpose))[:size].tolist()


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Return a random stream of its own for each purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


def split_off(
    rows: Sequence[TextRow], size: int, setting: str
) -> tuple[list[TextRow], list[TextRow]]:
    """Set `size` rows aside; rows with the same prompt stay on the same side.

    Args:
        rows: The rows to split.
        size: Rows to set aside.
        setting: The setting that asks for it, for messages; it also keys the draw.

    Returns:
        The remaining rows and those set aside, each in the order of `rows`.

    Raises:
        InputError: `size` leaves one side empty.
    """
    if not 1 <= size < len(rows):
        raise InputError(
            f"--{setting}={size} of {len(rows)} rows: expected 1 to {len(rows) - 1} of them"
        )
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(number)
    members = list(groups.values())
    aside: set[int] = set()
    for group in draw(len(members), len(members), SPLIT_SEED, setting):
        if len(aside) + len(members[group]) <= size:
            aside.update(members[group])
    rest = [row for number, row in enumerate(rows) if number not in aside]
    return rest, [row for number, row in enumerate(rows) if number in aside]


class TextDataModule(LightningDataModule):
    """Serve a text-to-text task to training, evaluation and the LoRA-One initialisation.

    Args:
        path: Local file or folder of the data; null takes it from where it is published.
        max_length: Most tokens of an example: of prompt and answer (causal LM), or of the prompt
            (encoder-decoder). A longer prompt loses the end of its text, never its last line.
        batch_size: Training examples of a batch, on each process.
        eval_batch_size: Examples of a validation or test batch, on each process.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        seed: Fixes the order of training, the subset `train_size` and the initialisation rows. The
            rows held out for validation and test do not depend on it.
        train_size: Number of training rows to use, drawn by `seed`; null uses all.
        validation_size: Number of training rows set aside for validation.
    """

    task_name: str
    label_words: tuple[str, ...]

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
        for name, least in (
            ("max_length", 1),
            ("batch_size", 1),
            ("eval_batch_size", 1),
            ("num_workers", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"--data.{name}={getattr(self, name)}: expected at least {least}")
        self.source = path or ""
        self.dropped_rows: dict[str, int] = {}
        self.cut_prompts: dict[str, int] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.is_encoder_decoder = False
        self._rows: dict[str, list[TextRow]] | None = None
        self._encoded: dict[str, list[EncodedRow]] = {}

    def load(self) -> dict[str, list[TextRow]]:
        """Return the rows of "train", "validation" and "test"; each source writes this."""
        raise NotImplementedError

    def attach(self, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> None:
        """Set what depends on the model; `setup` does it from the trainer's module."""
        if tokenizer is not self.tokenizer or is_encoder_decoder != self.is_encoder_decoder:
            self._encoded.clear()
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder

    def prepare_data(self) -> None:
        """Download published data, once for all processes of a node."""
        if self.path is None:
            self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the rows and encode those of the stage, so that bad input stops the run here."""
        if self.trainer is not None:
            module: Any = self.trainer.lightning_module
            self.attach(module.tokenizer, module.is_encoder_decoder)
        stages = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}
        for split in stages.get(stage or "", ["train", "validation", "test"]):
            self.encoded(split)

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
            self._encoded[split], num_cut = encode(
                self.rows(split), self._tokenizer(), self.is_encoder_decoder, self.max_length, name
            )
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

    def val_dataloader(self) -> DataLoader[EncodedRow]:
        """Return the validation rows, longest first."""
        return self._loader("validation", self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> DataLoader[EncodedRow]:
        """Return the test rows, longest first."""
        return self._loader("test", self.eval_batch_size, shuffle=False)

    def gradient_batches(
        self, num_samples: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return this process's share of the LoRA-One initialisation rows.

        The rows are drawn once from the training rows by `seed`; neither the micro-batch size nor
        the number of processes changes which. The shares differ by at most one row.

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
        mine = [chosen[i] for i in longest_first([len(row) for row in chosen])][rank::world_size]
        starts = range(0, len(mine), micro_batch_size)
        return [self._collate()(mine[start : start + micro_batch_size]) for start in starts]

    def label_token_ids(self) -> list[int]:
        """Return the first token of each label word, as it stands in an answer.

        Raises:
            InputError: Two words begin with the same token, so that it cannot tell them apart.
        """
        tokenizer = self._tokenizer()
        before = answer_prefix(tokenizer, self.is_encoder_decoder)
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
        }

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RuntimeError(
                "no tokenizer: call attach(tokenizer, is_encoder_decoder) or setup() first"
            )
        return self.tokenizer

    def _collate(self) -> Callable[[Sequence[EncodedRow]], Batch]:
        pad_id = self._tokenizer().pad_token_id or 0
        return partial(collate, pad_id=pad_id, is_encoder_decoder=self.is_encoder_decoder)

    def _loader(self, split: str, batch_size: int, shuffle: bool) -> DataLoader[EncodedRow]:
        rows = self.encoded(split)
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        sampler = LengthGroupedSampler(
            [len(row) for row in rows], batch_size, shuffle, self.seed, rank, world_size
        )
        return DataLoader(
            cast(Dataset[EncodedRow], rows),
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate(),
        )
