"""From (prompt, answer) text to token ids and padded batches."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import tokenizers
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from app.models.batch import Batch
from app.utils.console import track
from app.utils.errors import InputError
from data_modules.rows import EncodedRow, TextRow, collate
from data_modules.special_tokens import special_token_pattern

CHUNK_ROWS = 1024  # tokenized in one call: fast, without the token strings of a corpus in memory
MANY_CHUNKS = 20


def chunks(rows: Sequence[TextRow], name: str) -> Iterator[tuple[int, Sequence[TextRow]]]:
    """Yield where each chunk of rows begins, and the chunk, with progress where they are many."""
    starts = range(0, len(rows), CHUNK_ROWS)
    for start in track(starts, f"tokenizing {name}") if len(starts) >= MANY_CHUNKS else starts:
        yield start, rows[start : start + CHUNK_ROWS]


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
            turns = [self._turns([{"role": "user", "content": text}], ask=True) for text in texts]
            ids = tokenizer(turns, add_special_tokens=False)["input_ids"]
            for i in self._with_special_tokens(texts):
                ids[i] = self._around(turns[i], texts[i])
            return ids
        if self.is_encoder_decoder:
            return tokenizer(texts, split_special_tokens=True)["input_ids"]
        return [self.prefix + tokens for tokens in self._text_ids(texts)]

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize text of the data, in which "</s>" is four characters and no EOS."""
        ids = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return ids["input_ids"]

    def _with_special_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return which texts have a special token's characters in them."""
        pattern = special_token_pattern(self.tokenizer)
        return [i for i, text in enumerate(texts) if pattern.search(text)]

    def _around(self, turn: str, text: str) -> list[int]:
        """Tokenize a turn of the chat template, whose special tokens are none inside the text."""
        content = "CONTENT"
        empty = self._turns([{"role": "user", "content": content}], ask=True)
        before, _, after = empty.rpartition(content)
        kept = [inside for inside in (text, text.strip()) if before + inside + after == turn]
        if not kept:
            raise InputError(
                f"the chat template changes {text!r}, which has the characters of a special token: expected "
                "that it keeps the text; correct the data, or set --data.chat_template=false"
            )
        begin, end = self.tokenizer([before, after], add_special_tokens=False)["input_ids"]
        return [*begin, *self._text_ids(kept)[0], *end]

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
        return "" if self._marks_words else " "

    @cached_property
    def _marks_words(self) -> bool:
        first_id = self.tokenizer("a", add_special_tokens=False)["input_ids"][0]
        return str(self.tokenizer.convert_ids_to_tokens(first_id)).startswith(("▁", "Ġ"))

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
        for start, chunk in chunks(rows, name):
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
                if not prompt and not row.prompt.strip():
                    wrong = f"row {index} of {name} has an empty prompt: expected text"
                    raise InputError(f"{wrong}; correct the data (--data.path)")
                if not prompt:
                    raise InputError(
                        f"--data.max_length={max_length} has no room for any text of row {index} of {name} "
                        "beside its last line and its answer: expected more; raise --data.max_length"
                    )
                ids = array("i", prompt), array("i", answer)
                encoded.append(EncodedRow(*ids, index, row.target))
        return encoded, num_long

    def identity(self, *limits: int | None) -> tuple[str, ...]:
        """Return what tells apart encoders, and limits, that make other tokens of the same rows."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = json.dumps(tokenizer.get_vocab()) if backend is None else backend.to_str()
        turn = ""
        if self.chat_template:  # which may write today's date
            turn = self._turns([{"role": "user", "content": "a"}], ask=True)
            turn += str(tokenizer.chat_template)
        probe = f"{tokenizer('a')['input_ids']} {tokenizer.eos_token_id} {self.is_encoder_decoder}"
        versions = f"{transformers.__version__} {tokenizers.__version__}"
        return type(tokenizer).__name__, vocabulary, turn, probe, versions, str(limits)

    def warn_of_special_tokens(self, rows_of: Mapping[str, Sequence[TextRow]]) -> None:
        """Say how many rows have the characters of special tokens, which some tools read as such."""
        for name, rows in rows_of.items():
            if marked := len(self._with_special_tokens([row.text for row in rows])):
                rank_zero_warn(
                    f"{marked} of {len(rows)} {name} rows have the characters of special tokens, such as "
                    f"{self.tokenizer.eos_token}, which are read as text"
                )

    def _answers(self, rows: Sequence[TextRow]) -> list[list[int] | None]:
        """Return the supervised tokens of each row; None where its answer has no token."""
        end = self.answer_end()
        ids = self._text_ids([self.answer_prefix(row.prompt) + row.answer for row in rows])
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
                shorter,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
            )
            spans = encoding["offset_mapping"]
            starts = [begin for begin, end in spans if begin < end <= len(text)]
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
        """Pad encoded rows to one batch; see `rows.collate`."""
        return collate(rows, self.tokenizer.pad_token_id or 0, self.is_encoder_decoder)
