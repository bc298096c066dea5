"""From (prompt, answer) text to token ids and padded batches."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from app.models.batch import IGNORED_LABEL, Batch
from app.utils.errors import InputError

CHUNK_ROWS = 1024  # tokenised in one call: fast, without the token strings of a corpus in memory


@dataclass(frozen=True)
class TextRow:
    """One example as text: what the model reads, what it shall answer, and the answer's class, if any."""

    prompt: str
    answer: str
    target: int = 0


@dataclass(frozen=True)
class EncodedRow:
    """One example as token ids; those of the answer with its end are the supervised ones.

    A padding row evens out the processes' numbers of rows: its `index` and `target` are -1, and none of
    its tokens is supervised.
    """

    prompt_ids: "array[int]"
    answer_ids: "array[int]"
    index: int
    target: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def is_padding(self) -> bool:
        """Whether the row stands for none."""
        return self.index < 0


class PaddedRows(Dataset[EncodedRow]):
    """Rows by number, and a padding row (the tokens of the shortest) for every negative number."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows
        self.padding = replace(min(rows, key=len), index=-1, target=-1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> EncodedRow:
        return self.rows[number] if number >= 0 else self.padding


def answer_prefix(
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    chat_template: bool = False,
    prompt: str = "",
) -> str:
    """Return what goes before an answer so that its first token is the one used inside a text.

    A causal LM continues the prompt: "result:" + " positive", without the space where the tokenizer
    marks the start of a word by itself (SentencePiece) and at the start of a line. A decoder, and a turn
    of a chat, begin with the answer.
    Differs: the LoRA-One code has the space in the prompt ("result: " + "positive"), where BPE over
    bytes makes of it a token of its own, which is rare before a word; and it has a space after a line break.
    """
    if is_encoder_decoder or chat_template or prompt.rstrip(" ").endswith("\n"):
        return ""
    first_id = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    return "" if str(tokenizer.convert_ids_to_tokens(first_id)).startswith(("▁", "Ġ")) else " "


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    chat_template: bool = False,
) -> list[list[int]]:
    """Tokenise prompts as a model reads them before it answers; the same in training and evaluation.

    Args:
        prompts: Spaces at the end are dropped: an answer begins with its own.
        tokenizer: A fast tokenizer.
        is_encoder_decoder: Whether the prompt is a sequence of its own, with the tokenizer's special tokens.
        chat_template: Put each prompt into the tokenizer's chat template, as the user's message.

    Returns:
        Token ids, with BOS only where the tokenizer adds it unasked.

    Raises:
        InputError: `chat_template` with a tokenizer that has none.
    """
    texts = [prompt.rstrip(" ") for prompt in prompts]
    if chat_template:
        texts = [_turns(tokenizer, [{"role": "user", "content": text}], True) for text in texts]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    first_id = tokenizer("a")["input_ids"][0]
    bos = [first_id] if first_id == tokenizer.bos_token_id and not is_encoder_decoder else []
    found = tokenizer(texts, add_special_tokens=is_encoder_decoder)["input_ids"]
    return [bos + ids for ids in found]


def answer_end(tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> list[int]:
    """Return the tokens that end an answer: EOS, and before it what ends a turn of the chat template.

    Most templates end a turn with EOS. Where it is another token ("<end_of_turn>"), both are learnt, since
    generation stops at EOS.

    Raises:
        InputError: A tokenizer without EOS, or `chat_template` with one that has none.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, which ends every answer: "
            "expected a model whose tokenizer has one; change --model"
        )
    if not chat_template:
        return [eos]
    user, answer = {"role": "user", "content": "a"}, "ANSWER"
    text = _turns(tokenizer, [user, {"role": "assistant", "content": answer}], False)
    behind = text.rpartition(answer)[2].strip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    marks = tokenizer.added_tokens_decoder
    return [*(token for token in ids if token in marks and token != eos), eos]


def _turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], ask: bool) -> str:
    """Write messages in the tokenizer's chat template, up to where the answer begins if `ask`."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"--data.chat_template=true, but the tokenizer {tokenizer.name_or_path!r} has no "
            "chat template: expected an instruct model; set it to false or change --model.name"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return str(text)


def encode(
    rows: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    max_length: int,
    name: str = "data",
    chat_template: bool = False,
    too_long: Literal["cut", "drop"] = "cut",
) -> tuple[list[EncodedRow], int]:
    """Tokenise prompts and answers apart, and cut the prompts that are too long or drop their rows.

        causal:          [BOS] prompt + answer + EOS    BOS only where the tokenizer adds it unasked
        chat template:   the user's turn + answer + the end of a turn
        encoder-decoder: prompt with the tokenizer's own special tokens, and answer + EOS

    A cut prompt loses the end of its text, never its last line ("result:"); no answer is ever cut.

    Args:
        rows: The examples; spaces at the end of a prompt are dropped.
        tokenizer: A fast tokenizer with an EOS token.
        is_encoder_decoder: Whether prompt and answer are sequences of their own.
        max_length: Most tokens of prompt and answer (causal), or of the prompt (encoder-decoder).
        name: What messages call these rows.
        chat_template: Put each prompt into the tokenizer's chat template.
        too_long: What to do with rows of more tokens.

    Returns:
        The encoded rows in the order of `rows`, which their `index` counts, and how many were cut or dropped.

    Raises:
        InputError: An empty answer, a tokenizer without EOS, or no room for any text of a prompt.
    """
    end = answer_end(tokenizer, chat_template)
    form = (tokenizer, is_encoder_decoder, chat_template)
    encoded: list[EncodedRow] = []
    num_long = 0
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        prompt_ids = encode_prompts([row.prompt for row in chunk], *form)
        answers = [answer_prefix(*form, row.prompt) + row.answer for row in chunk]
        answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        for offset, row in enumerate(chunk):
            where = f"row {start + offset} of {name}"
            ids, supervised = prompt_ids[offset], [*answer_ids[offset], *end]
            if not row.answer.strip() or not answer_ids[offset]:
                raise InputError(
                    f"{where} has the answer {row.answer!r}, which gives no token to learn: "
                    "expected a word; correct the data (--data.path)"
                )
            room = max_length - (0 if is_encoder_decoder else len(supervised))
            if len(ids) > room:
                num_long += 1
                if too_long == "drop":
                    continue
                ids = _cut_prompt(row.prompt.rstrip(" "), room, *form)
            if not ids:
                raise InputError(
                    f"--data.max_length={max_length} has no room for any text of {where} beside "
                    "its last line and its answer: expected more; raise --data.max_length"
                )
            prompt, answer = array("i", ids), array("i", supervised)
            encoded.append(EncodedRow(prompt, answer, start + offset, row.target))
    return encoded, num_long


def _cut_prompt(
    prompt: str,
    room: int,
    tokenizer: PreTrainedTokenizerBase,
    is_encoder_decoder: bool,
    chat_template: bool,
) -> list[int]:
    """Cut the end of the text before the last line until all fits; [] if no text is left."""
    text, newline, last_line = prompt.rpartition("\n")
    if not newline:
        text, last_line = prompt, ""
    while text:
        shorter = text + newline + last_line
        ids = encode_prompts([shorter], tokenizer, is_encoder_decoder, chat_template)[0]
        excess = len(ids) - room
        if excess <= 0:
            return ids
        encoding = tokenizer(shorter, add_special_tokens=False, return_offsets_mapping=True)
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
        (causal: L == T, unshifted), `index` and `target` (B,), -1 in a padding row; all int64, padded
        at the right.
    """
    inputs, labels = [], []
    for row in rows:
        prompt, answer = row.prompt_ids.tolist(), row.answer_ids.tolist()
        inputs.append(prompt if is_encoder_decoder else prompt + answer)
        wanted = [IGNORED_LABEL] * len(answer) if row.is_padding else answer
        labels.append(wanted if is_encoder_decoder else [IGNORED_LABEL] * len(prompt) + wanted)
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
