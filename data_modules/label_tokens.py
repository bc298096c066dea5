"""The first token of each label word, by which rows with classes are scored."""

from collections.abc import Iterable, Sequence

from app.utils.errors import InputError
from data_modules.encoding import TextEncoder


def label_token_ids(
    encoder: TextEncoder, words: Sequence[str], prompts: Iterable[str], name: str
) -> list[int]:
    """Return the first token of each label word, as it stands in an answer to these prompts.

    Args:
        encoder: How the model reads text.
        words: One for each class, in their order.
        prompts: Of all rows; a word begins with another token behind a line break.
        name: Of the data, for messages.

    Raises:
        InputError: Some prompts end in a line break and others do not, or two words begin with the same token,
            so that it cannot tell them apart.
    """
    if not words:
        return []
    prefixes = {encoder.answer_prefix(prompt) for prompt in prompts}
    if len(prefixes) > 1:
        raise InputError(
            f"some prompts of {name} end in a line break and others do not, behind which a label word begins "
            "with another token: expected one end of all; change --data.prompt or the texts"
        )
    [prefix] = prefixes or {encoder.answer_prefix()}
    tokenizer = encoder.tokenizer
    words_by_id: dict[int, str] = {}
    for word in words:
        first_id = tokenizer(prefix + word, add_special_tokens=False)["input_ids"][0]
        if first_id in words_by_id:
            raise InputError(
                f"the labels {words_by_id[first_id]!r} and {word!r} of {name} begin with the same token "
                f"{tokenizer.convert_ids_to_tokens(first_id)!r}: expected words that differ there; change "
                "--model.name or --data (of a table, --data.label_words)"
            )
        words_by_id[first_id] = word
    return list(words_by_id)
