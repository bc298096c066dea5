"""Outputs that grow by a token, and the strings that end them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from app.models.decoding import NOT_FINITE
from app.utils.errors import InputError


@dataclass(frozen=True)
class Generated:
    """One output."""

    text: str  # what follows the prompt, without special tokens, EOS, and the stop string that ended it
    num_tokens: int  # those that ended it among them
    finished: bool  # whether EOS or a stop string ended it, not a limit


class Output:
    """One output to the question `key` as it grows, of at most `limit` tokens.

    `before` is the prompt's last token, None where the output is a text of its own.
    """

    def __init__(self, key: str, before: int | None, limit: int) -> None:
        self.key, self.before, self.limit = key, before, limit
        self.tokens: list[int] = []
        self.has_end_token = False
        self.finished = False

    @property
    def ended(self) -> bool:
        """Whether no more tokens belong to it."""
        return self.finished or len(self.tokens) == self.limit

    def add(self, token: int, stop: "StopStrings") -> None:
        """Append the next token; raise InputError if it is NOT_FINITE."""
        if token == NOT_FINITE:
            raise InputError(
                f"the model's logits are not finite {len(self.tokens)} tokens into its answer to "
                f"{self.key!r}: its weights have diverged, or need a wider precision (model.dtype, "
                "trainer.precision)"
            )
        self.tokens.append(token)
        self.has_end_token = token in stop.ends
        self.finished = self.has_end_token or stop.just_came(self)


class StopStrings:
    """Find the strings or tokens (`ends`) that end outputs, in time that does not depend on their length."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], ends: set[int]
    ) -> None:
        self.tokenizer, self.strings, self.ends = tokenizer, strings, ends
        # A token is at least one byte of text.
        self.window = max((len(string.encode()) for string in strings), default=0)

    def just_came(self, output: Output) -> bool:
        """Return whether the newest token completes a stop string; special tokens count by their names."""
        if not self.strings:
            return False
        tokens = output.tokens
        before = tokens[-self.window - 1] if len(tokens) > self.window else output.before
        text = self._text(before, tokens[-self.window :], skip_special_tokens=False)
        return any(string in text for string in self.strings)

    def cut(self, output: Output) -> Generated:
        """Return what came before the first stop string."""
        tokens = output.tokens[:-1] if output.has_end_token else output.tokens
        text = self._text(output.before, tokens, skip_special_tokens=True)
        places = [place for place in map(text.find, self.strings) if place >= 0]
        return Generated(
            text[: min(places, default=len(text))],
            num_tokens=len(output.tokens),
            finished=output.finished or bool(places),
        )

    def _text(self, before: int | None, tokens: list[int], skip_special_tokens: bool) -> str:
        """Decode tokens behind another, since SentencePiece drops a space where a text begins."""

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(  # type: ignore[return-value]
                ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )

        if before is None:
            return decode(tokens)
        return decode([before, *tokens]).removeprefix(decode([before]))
