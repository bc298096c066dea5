"""Conversations of one's own, in the model's chat template; the assistant's turns are learnt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.utils.errors import InputError
from data_modules.chat_encoding import ChatEncoder
from data_modules.conversations import Conversation, conversation
from data_modules.generative import GenerativeDataModule
from data_modules.row_checks import check_rows, warn_of_repeated
from data_modules.rows import EncodedRow, TextRow
from data_modules.sampling import tenth_for_validation
from data_modules.tables import is_published, read_tables


class ChatDataModule(GenerativeDataModule):
    """Train on the assistant's turns of conversations in JSON lines, JSON or Parquet, or of the Hub.

    A row has `messages` (OpenAI: role and content, `weight` 0 for an answer that is not learnt),
    `conversations` (ShareGPT: from and value), `prompt` and `completion`, or `instruction`, `input` and
    `output` (Alpaca). Turns are written by the tokenizer's chat template. Left out and counted: conversations
    that call tools, without an answer, with an empty one, or of more than `max_length` tokens.

    Args:
        path: File (also gzipped, .gz), a folder that `save_to_disk` of `datasets` wrote, or the name of a set
            of the Hub, whose split `train` is read.
        max_length: Most tokens of a conversation; a longer one is dropped.
        validation_size: Conversations set aside to validate; null takes a tenth, at most 1,000, where there is
            no `validation_file`, and 0 none.
        validation_file: File with the conversations that validate.
        config_name: Which of the sets that the Hub has under the name `path`.
        **options: See `GenerativeDataModule`.
    """

    task_name = "chat"

    def __init__(
        self,
        path: str,
        max_length: int = 1024,
        validation_size: int | None = None,
        validation_file: str | None = None,
        config_name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            path,
            max_length,
            keep_below=None,
            validation_size=validation_size or 0,
            chat_template=True,
            **options,
        )
        if validation_file is not None and validation_size is not None:
            raise InputError(
                f"--data.validation_file={validation_file} and --data.validation_size={validation_size} are "
                "given: expected one of them; set the other to null"
            )
        self.validation_size = validation_size
        self.validation_file = validation_file
        self.config_name = config_name
        self.files = {"validation": validation_file}
        self.setting = "--data.path"  # names the file, in messages
        self._conversations: list[TextRow] = []

    def prepare_data(self) -> None:
        """Download a set of the Hub, once for all processes of a node."""
        if is_published(str(self.path)):
            self.read()

    def read(self) -> None:
        """Read the conversations, and decide how many of them validate."""
        super().read()
        if self.validation_size is None and self.validation_file is None:
            self.validation_size = tenth_for_validation(len(self._candidates), str(self.path))

    def load(self) -> dict[str, list[TextRow]]:
        """Return the conversations by their use."""
        rows = super().load()
        if self.validation_file is not None:
            held_out = ChatDataModule(self.validation_file, self.max_length, validation_size=0)
            held_out.setting, encoder = "--data.validation_file", self.encoder
            held_out.attach(encoder.tokenizer, encoder.is_encoder_decoder, encoder.context_length)
            rows["validation"] = held_out.rows("train")
            self._tokens |= zip(rows["validation"], held_out.encoded("train"), strict=True)
            # Those that are there twice are counted already.
            once = list(dict.fromkeys(rows["train"]))
            warn_of_repeated({**rows, "train": once}, str(self.path))
        return rows

    def candidates(self) -> list[TextRow]:
        """Return a row of each conversation with an answer, and say what is left out of them."""
        table = read_tables(str(self.path), self.config_name, self.setting)["train"]
        ignored: Counter[str] = Counter()
        self.dropped_rows |= {"tool_calls": 0, "no_question_or_answer": 0}
        rows = []
        for where, columns in table:
            told = conversation(columns, where, table.setting)
            ignored["have tools, which are not written into their prompts"] += bool(
                columns.get("tools")
            )
            ignored["have reasoning beside the content of messages, which is left out"] += (
                told.reasons
            )
            row = self._row(told, ignored)
            if row is not None:
                rows.append(row)
        for what, count in ignored.items():
            if count:
                rank_zero_warn(f"{count} conversations of {self.path} {what}")
        check_rows(rows, self.task_name)
        warn_of_repeated({"train": rows}, str(self.path))
        return rows

    def _row(self, told: Conversation, ignored: Counter[str]) -> TextRow | None:
        """Return the row of a conversation, up to its last answer; None if it is left out."""
        turns = list(told.turns)
        if told.calls_tools:
            self.dropped_rows["tool_calls"] += 1
            return None
        begin = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
        user = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
        answered = any(turn.learnt for turn in turns[user:])
        if not answered:
            self.dropped_rows["no_question_or_answer"] += 1
            return None
        ignored["begin with the assistant, whose first words are left out"] += user > begin
        del turns[begin:user]
        last = max(i for i, turn in enumerate(turns) if turn.learnt)
        ignored["end with turns that are not answered or learnt, which are left out"] += (
            last < len(turns) - 1
        )
        turns = turns[: last + 1]
        first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
        answers = [turn.content for turn in turns if turn.role == "assistant"]
        question = "\n".join(turn.content for turn in turns[begin:first])
        answer = "\n".join(answers) if all(map(str.strip, answers)) else ""
        return TextRow(question, answer, turns=tuple(turns))

    def _short_enough(self) -> list[TextRow]:
        """Return the rows that are short enough; a template that rewrites turns has one for each answer."""
        is_seq2seq = self.encoder.is_encoder_decoder
        if is_seq2seq or self.encoder.tokenizer.chat_template is None:
            found = "is a sequence-to-sequence model" if is_seq2seq else "has no chat template"
            raise InputError(
                f"ChatDataModule is given, but model.name {found}: expected a causal model with a chat "
                "template, such as an instruct model; change --model.name"
            )
        rows = self._conversations = self._conversations or self._candidates
        parts = ChatEncoder(self.encoder.tokenizer).rows_of
        self._candidates = [
            replace(row, turns=part) for row in rows for part in parts(row.turns, _where(row))
        ]
        if len(self._candidates) > len(rows):
            rank_zero_warn(
                f"the chat template of model.name rewrites earlier turns: {len(rows)} conversations are "
                f"{len(self._candidates)} rows, one for each answer"
            )
        return super()._short_enough()

    def encode(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        """Return the conversations of at most `max_length` tokens, numbered as they stand in `rows`."""
        encoder = ChatEncoder(self.encoder.tokenizer)
        encoded = [encoder.row(row.turns, index, _where(row)) for index, row in enumerate(rows)]
        return [row for row in encoded if len(row) <= self.max_length]


def _where(row: TextRow) -> str:
    return f"the conversation that begins with {row.prompt[:40]!r}"
