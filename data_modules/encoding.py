"""From (prompt, answer) text to token ids and padded batches."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from app.models.batch import IGNORED_LABEL, Batch
from app.utils.errors import InputError

CHUNK_ROWS = 1024  # tokenized in one call: fast, without the token strings of a corpus in memory


@dataclass(frozen=True)
class TextRow:
    """One example as text: what the model reads, what it shall answer, and the answer's class, if any."""

    prompt: str
    answer: str
    target: int = 0


@dataclass(frozen=True)
class EncodedRow:
    """One example as token ids; those of the answer with its end are the supervised ones.

    A padding row evens out the processes' numbers of rows: its `index` and `target` are -1, and none of its
    tokens is supervised.
    """

    prompt_ids: "array[int]"
    answer_ids: "array[int]"
    index: int
    target: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


class PaddedRows(Dataset[EncodedRow]):
    """Rows by number, and a padding row (the tokens of the shortest) for every negative number."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows
        self.lengths = [len(row) for row in rows]
        self.padding = replace(min(rows, key=len), index=-1, target=-1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> EncodedRow:
        return self.rows[number] if number >= 0 else self.padding


@dataclass(frozen=True)
class TextEncoder:
    """Turn prompts and answers into the token ids that one model reads.

    Args:
        is_encoder_decoder: Whether prompt and answer are sequences of their own.
        chat_template: Put every prompt into the tokenizer's chat template, as the user's message.
        context_length: Positions that the model knows: tokens of prompt and answer together (causal), or
            of the prompt; None if there is no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool = False
    chat_template: bool = False
    context_length: int | None = None

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenize prompts as the model reads them before it answers; the same in training and benchmarks.

        Spaces at the end are dropped: an answer begins with its own. What the tokenizer adds before a text
        unasked, such as BOS, stands before a prompt; what it adds behind, such as EOS, stands behind prompts of
        encoders only: a causal model goes on with the answer. A chat template writes such tokens itself.

        Raises:
            InputError: `chat_template` with a tokenizer that has none.
        """
        tokenizer = self.tokenizer
        texts = [prompt.rstrip(" ") for prompt in prompts]
        if self.chat_template:
            texts = [self._turns([{"role": "user", "content": text}], ask=True) for text in texts]
            return tokenizer(texts, add_special_tokens=False)["input_ids"]
        if self.is_encoder_decoder:
            return tokenizer(texts)["input_ids"]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self.prefix + tokens for tokens in ids]

    @cached_property
    def prefix(self) -> list[int]:
        """Return the special tokens that the tokenizer adds before a text unasked: mostly BOS, or none.

        Raises:
            InputError: They change the tokens of the text itself.
        """
        tokenizer = self.tokenizer
        text, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        for begin in range(len(whole) - len(text) + 1):
            if whole[begin : begin + len(text)] == text:
                return whole[:begin]
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} reads 'a' as {text}, with special tokens as {whole}: "
            "expected the same tokens between others; change --model.name"
        )

    def last_tokens(self, ids: list[int], room: int) -> list[int]:
        """Return the last tokens of a prompt, behind the prefix (in a chat template, BOS) it begins with."""
        marks = (self.prefix, [self.tokenizer.bos_token_id])
        kept = next((mark for mark in marks if mark and ids[: len(mark)] == mark), [])
        return kept + ids[len(ids) - room + len(kept) :]

    def answer_prefix(self, prompt: str = "") -> str:
        """Return what goes before an answer so that its first token is the one used inside a text.

        A causal LM continues the prompt: "result:" + " positive", without the space where the tokenizer
        marks the start of a word by itself (SentencePiece) and at the start of a line. A decoder, and a turn
        of a chat, begin with the answer.
        Differs: the LoRA-One code has the space in the prompt ("result: " + "positive"), where BPE over
        bytes makes of it a token of its own, rare before a word; and it has a space after a line break.
        """
        if self.is_encoder_decoder or self.chat_template or prompt.rstrip(" ").endswith("\n"):
            return ""
        first_id = self.tokenizer("a", add_special_tokens=False)["input_ids"][0]
        first = str(self.tokenizer.convert_ids_to_tokens(first_id))
        return "" if first.startswith(("▁", "Ġ")) else " "

    def answer_end(self) -> list[int]:
        """Return the tokens that end an answer: EOS, and before it what ends a turn of the chat template.

        Most templates end a turn with EOS. Where it is another token ("<end_of_turn>"), both are learnt, since
        generation stops at EOS.

        Raises:
            InputError: A tokenizer without EOS, or `chat_template` with one that has none.
        """
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_id
        if eos is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, which ends every answer: "
                "expected a model whose tokenizer has one; change --model.name"
            )
        if not self.chat_template:
            return [eos]
        user, answer = {"role": "user", "content": "a"}, "ANSWER"
        text = self._turns([user, {"role": "assistant", "content": answer}], ask=False)
        behind = text.rpartition(answer)[2].strip()
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        marks = tokenizer.added_tokens_decoder
        return [*(token for token in ids if token in marks and token != eos), eos]

    def first_tokens(self, words: Sequence[str], name: str = "data") -> list[int]:
        """Return the first token of each label word, as it stands in an answer behind a prompt's last word.

        Raises:
            InputError: Two words begin with the same token, so that it cannot tell them apart.
        """
        tokenizer, prefix = self.tokenizer, self.answer_prefix()
        words_by_id: dict[int, str] = {}
        for word in words:
            first_id = tokenizer(prefix + word, add_special_tokens=False)["input_ids"][0]
            if first_id in words_by_id:
                raise InputError(
                    f"the labels {words_by_id[first_id]!r} and {word!r} of {name} begin with the same token "
                    f"{tokenizer.convert_ids_to_tokens(first_id)!r}: expected words that differ there; change "
                    "--model.name or --data"
                )
            words_by_id[first_id] = word
        return list(words_by_id)

    def rows(
        self,
        rows: Sequence[TextRow],
        max_length: int,
        name: str = "data",
        too_long: Literal["cut", "drop"] = "cut",
    ) -> tuple[list[EncodedRow], int]:
        """Tokenize prompts and answers apart, and cut the prompts that are too long or drop their rows.

            causal:          [BOS] prompt + answer + EOS    BOS, or other tokens, where the tokenizer adds them
            chat template:   the user's turn + answer + the end of a turn
            encoder-decoder: prompt with the tokenizer's own special tokens, and answer + EOS

        A cut prompt loses the end of its text, never its last line ("result:"); no answer is ever cut.

        `max_length` counts tokens of prompt and answer (causal), or of the prompt (encoder-decoder).

        Returns:
            The encoded rows in the order of `rows`, which `index` counts, and how many were cut or dropped.

        Raises:
            InputError: An empty answer, a tokenizer without EOS, or no room for any text of a prompt.
        """
        encoded: list[EncodedRow] = []
        num_long = 0
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            tokens = zip(
                self.prompts([row.prompt for row in chunk]), self._answers(chunk), strict=True
            )
            for index, (row, (prompt, answer)) in enumerate(zip(chunk, tokens, strict=True), start):
                if answer is None:
                    raise InputError(
                        f"row {index} of {name} has the answer {row.answer!r}, which gives no token to learn: "
                        "expected a word; correct the data (--data.path)"
                    )
                room = max_length - (0 if self.is_encoder_decoder else len(answer))
                if len(prompt) > room:
                    num_long += 1
                    if too_long == "drop":
                        continue
                    prompt = self._cut(row.prompt.rstrip(" "), room)
                if not prompt:
                    raise InputError(
                        f"--data.max_length={max_length} has no room for any text of row {index} of {name} "
                        "beside its last line and its answer: expected more; raise --data.max_length"
                    )
                encoded.append(
                    EncodedRow(array("i", prompt), array("i", answer), index, row.target)
                )
        return encoded, num_long

    def _answers(self, rows: Sequence[TextRow]) -> list[list[int] | None]:
        """Return the supervised tokens of each row; None where its answer has no token."""
        end = self.answer_end()
        texts = [self.answer_prefix(row.prompt) + row.answer for row in rows]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            [*tokens, *end] if tokens and row.answer.strip() else None
            for row, tokens in zip(rows, ids, strict=True)
        ]

    def _cut(self, prompt: str, room: int) -> list[int]:
        """Cut the end of the text before the last line until all fits; [] if no text is left."""
        text, newline, last_line = prompt.rpartition("\n")
        if not newline:
            text, last_line = prompt, ""
        while text:
            shorter = text + newline + last_line
            ids = self.prompts([shorter])[0]
            excess = len(ids) - room
            if excess <= 0:
                return ids
            encoding = self.tokenizer(
                shorter, add_special_tokens=False, return_offsets_mapping=True
            )
            starts = [
                begin for begin, end in encoding["offset_mapping"] if begin < end <= len(text)
            ]
            text = text[: starts[-excess]].rstrip() if excess < len(starts) else ""
        return []

    def _turns(self, messages: list[dict[str, str]], ask: bool) -> str:
        """Write messages in the tokenizer's chat template, up to where the answer begins if `ask`."""
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"--data.chat_template=true, but the tokenizer {self.tokenizer.name_or_path!r} has no "
                "chat template: expected an instruct model; set it to false or change --model.name"
            )
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask
        )
        return str(text)

    def collate(self, rows: Sequence[EncodedRow]) -> Batch:
        """Pad encoded rows to one batch.

        Returns:
            `input_ids` and `attention_mask` (B, T), `labels` (B, L) with `IGNORED_LABEL` where nothing is
            learnt (causal: L == T, unshifted), `index` and `target` (B,), -1 in a padding row; all int64,
            padded at the right. The id at padded inputs may equal EOS, since `attention_mask` tells padding.
        """
        inputs, labels = [], []
        for row in rows:
            prompt, answer = row.prompt_ids.tolist(), row.answer_ids.tolist()
            wanted = [IGNORED_LABEL] * len(answer) if row.index < 0 else answer
            inputs.append(prompt if self.is_encoder_decoder else prompt + answer)
            before = [] if self.is_encoder_decoder else [IGNORED_LABEL] * len(prompt)
            labels.append(before + wanted)
        return {
            "input_ids": _pad(inputs, self.tokenizer.pad_token_id or 0),
            "attention_mask": _pad([[1] * len(ids) for ids in inputs], 0),
            "labels": _pad(labels, IGNORED_LABEL),
            "index": torch.tensor([row.index for row in rows]),
            "target": torch.tensor([row.target for row in rows]),
        }


def _pad(sequences: list[list[int]], value: int) -> Tensor:
    """Stack lists of different lengths, filled up at the right."""
    longest = max(map(len, sequences))
    return torch.tensor([ids + [value] * (longest - len(ids)) for ids in sequences])
