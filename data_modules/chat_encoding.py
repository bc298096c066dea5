"""From a conversation to the tokens of a model's chat template, and which of them the assistant writes."""

import itertools
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.utils.errors import InputError
from data_modules.rows import EncodedRow, Turn
from data_modules.special_tokens import special_token_pattern

REASONING = "</think>"
OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a special token's characters in a message
MARK = f"{OPEN}{CLOSE}"


@dataclass(frozen=True)
class ChatEncoder:
    """Turn conversations into the token ids that one causal model reads.

    An answer is what the template T adds behind what it writes to ask for it (`add_generation_prompt`), up to
    the end of the turn:

        answer i = T(m_1 ... m_i) - T(m_1 ... m_{i-1}, ask),    T(m_1 ... m_i) a prefix of T(m_1 ... m_n)

    Where T rewrites earlier turns, as templates of reasoning models do, there is a row for each answer.
    """

    tokenizer: PreTrainedTokenizerBase
    _nested: dict[tuple[object, ...], bool] = field(default_factory=dict, compare=False)

    def rows_of(self, turns: Sequence[Turn], where: str) -> list[tuple[Turn, ...]]:
        """Return the conversation, or its beginning up to each answer, which alone is then learnt.

        Args:
            turns: The last one is learnt.
            where: Where it stands, for messages.

        Raises:
            InputError: The template refuses the conversation.
        """
        form = tuple((turn.role, turn.learnt, REASONING in turn.content) for turn in turns)
        if form not in self._nested:
            short = [
                Turn(role, f"<think>\nr{i}\n{REASONING}\n\nm{i}" if thinks else f"m{i}", learnt)
                for i, (role, learnt, thinks) in enumerate(form)
            ]
            self._nested[form] = self._answers(short, where) is not None
        if self._nested[form]:
            return [tuple(turns)]
        return [
            (*(earlier._replace(learnt=False) for earlier in turns[:end]), turn)
            for end, turn in enumerate(turns)
            if turn.learnt
        ]

    def row(self, turns: Sequence[Turn], index: int, where: str) -> EncodedRow:
        """Tokenize a conversation.

            [what is read][answer][what is read][answer] ... EOS    the answers with the ends of their turns

        Args:
            turns: The last one is learnt.
            index: Number of the row.
            where: Where it stands, for messages.

        Raises:
            InputError: The template refuses the conversation, or where an answer begins cannot be told.
        """
        words = sorted({word for turn in turns for word in self._special.findall(turn.content)})
        hidden = [turn._replace(content=self._hide(turn.content, words)) for turn in turns]
        found = self._answers(hidden, where)
        if found is None:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not write {where} up to an answer "
                "as it asks for that answer: expected a template of text that leaves earlier messages alone; "
                "change --model.name"
            )
        text, answers = found
        parts = self._parts(text, [0, *(end for answer in answers for end in answer)], words)
        ids = [token for part in parts for token in part]
        bounds = list(itertools.accumulate(map(len, parts)))
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1] != eos:
            ids.append(eos)
            bounds[-1] += 1
        first = bounds[0]
        read_only = [
            (end - first, begin - first)
            for end, begin in zip(bounds[1:-1:2], bounds[2::2], strict=True)
        ]
        return EncodedRow(
            array("i", ids[:first]), array("i", ids[first:]), index, 0, tuple(read_only)
        )

    def _parts(self, text: str, bounds: Sequence[int], words: Sequence[str]) -> list[list[int]]:
        """Return the tokens between bounds: those of the whole text, if none of them is across a bound.

        A token across a bound is not what the model meets when it answers; from there on, parts are tokenized
        apart.
        """
        stretches = list(itertools.pairwise(bounds))
        parts = [self._ids(text[begin:end], words, not begin) for begin, end in stretches]
        if [token for part in parts for token in part] == self._ids(text[: bounds[-1]], words):
            return parts
        ids: list[int] = []
        for number, (_, end) in enumerate(stretches):
            upto = self._ids(text[:end], words)
            if upto[: len(ids)] != ids:
                break
            parts[number] = upto[len(ids) :]
            ids = upto
        return parts

    def _answers(
        self, turns: Sequence[Turn], where: str
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """Return what the template writes, and the characters [begin, end) of each learnt turn's answer.

        None where it does not begin with what it writes of fewer turns, or leaves an answer out.
        """
        text = self._write(turns, False, where)
        answers: list[tuple[int, int]] = []
        for number, turn in enumerate(turns):
            if not turn.learnt:
                continue
            before = self._write(turns[:number], True, where)
            last = number == len(turns) - 1
            upto = text if last else self._write(turns[: number + 1], False, where)
            if last and not answers and not upto.startswith(before):
                text = upto = before + self._behind_question(turns, text, where)
            answer = upto[len(before) :].rstrip()  # a line break is read before the next turn
            nested = text.startswith(upto) and upto.startswith(before)
            if not nested or turn.content.rpartition(REASONING)[2].strip() not in answer:
                return None
            answers.append((len(before), len(before) + len(answer)))
        return text, answers

    def _behind_question(self, turns: Sequence[Turn], text: str, where: str) -> str:
        """Return the last turn, as the template writes it behind a question; "" where that cannot be told.

        Mistral's templates write the system message in the last question alone, and not before an answer.
        """
        *earlier, question, answer = turns
        marked = question._replace(content=MARK), answer._replace(content=MARK)
        asked = self._write([*earlier, marked[0]], True, where).rpartition(MARK)[2]
        head = self._write([*earlier, question, marked[1]], False, where).partition(MARK)[0]
        if asked not in head or not text.startswith(head):
            return ""
        return text[head.rindex(asked) + len(asked) :]

    def _write(self, turns: Sequence[Turn], ask: bool, where: str) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=ask
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses {where} ({error}): expected "
                f"other roles than {', '.join(turn.role for turn in turns)}; correct the data (--data.path) or "
                "change --model.name"
            ) from error

    @cached_property
    def _special(self) -> "re.Pattern[str]":
        return special_token_pattern(self.tokenizer)

    def _hide(self, content: str, words: Sequence[str]) -> str:
        """Put a mark in the place of a special token's characters in a message, which are no token."""
        if not words:
            return content
        return self._special.sub(lambda match: f"{OPEN}{words.index(match[0])}{CLOSE}", content)

    def _ids(self, text: str, words: Sequence[str], begins: bool = True) -> list[int]:
        """Tokenize what the template wrote: its special tokens are tokens, those of messages are text.

        Args:
            text: From the beginning, or what stands behind other text.
            words: Those that marks in messages stand for.
            begins: Whether it is the beginning.
        """
        if not words:
            return self._plain_ids(text, False, begins)
        ids: list[int] = []
        at = 0
        for mark in [*self._special.finditer(text), None]:
            piece = text[at : mark.start() if mark else None]
            for number, word in enumerate(words):
                piece = piece.replace(f"{OPEN}{number}{CLOSE}", word)
            if piece:
                ids += self._plain_ids(piece, True, begins and at == 0)
            if mark:
                ids += self.tokenizer(mark[0], add_special_tokens=False)["input_ids"]
                at = mark.end()
        return ids

    def _plain_ids(self, text: str, split_special_tokens: bool, begins: bool) -> list[int]:
        def tokens(text: str) -> list[int]:
            options = {"split_special_tokens": split_special_tokens}
            ids = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
            return list(ids)

        if begins:
            return tokens(text)
        # Some tokenizers write a space before a text, which is none in the middle of one.
        before = tokens(MARK)
        ids = tokens(MARK + text)
        return ids[len(before) :] if ids[: len(before)] == before else tokens(text)
