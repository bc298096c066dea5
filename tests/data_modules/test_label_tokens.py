"""The tokens that rows with classes are scored by, against those that are learnt."""

import pytest

from app.utils.errors import InputError
from data_modules.encoding import TextEncoder
from data_modules.label_tokens import label_token_ids
from data_modules.rows import TextRow
from tests.support.tokenizers import WORDS, causal, seq2seq  # noqa: F401 (fixtures)


@pytest.fixture
def spaced(tiny_tokenizer):
    """A tokenizer that has another token for a word behind a space."""
    tiny_tokenizer.add_tokens([" negative", " positive", "negative", "positive"])
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    )
    return tiny_tokenizer


@pytest.mark.parametrize("end", ["\nresult: ", "\nresult:", "\n", "\n "])
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "line", "chat"])
def test_label_words_are_scored_where_they_stand(kind, end, causal, seq2seq, spaced):  # noqa: F811
    encoder = {
        "causal": TextEncoder(causal),
        "seq2seq": TextEncoder(seq2seq, True),
        "line": TextEncoder(spaced),
        "chat": TextEncoder(spaced, chat_template=True),
    }[kind]
    rows = [TextRow(f"a film{end}", word, target) for target, word in enumerate(WORDS)]
    learnt = [encoded.answer_ids[0] for encoded in encoder.rows(rows, 200)[0]]
    assert label_token_ids(encoder, WORDS, [row.prompt for row in rows], "films") == learnt
    if kind == "line":
        word = " positive" if end.startswith("\nresult") else "positive"
        assert spaced.decode(learnt[1]) == word


def test_without_prompts_or_words(spaced):
    encoder = TextEncoder(spaced)
    assert spaced.decode(label_token_ids(encoder, WORDS, [], "films")[1]) == " positive"
    assert label_token_ids(encoder, (), ["a:"], "films") == []


def test_what_cannot_be_told_apart(spaced, causal):  # noqa: F811
    with pytest.raises(InputError, match="'positive' and 'positive film' of films"):
        label_token_ids(TextEncoder(causal), ("positive", "positive film"), ["a:"], "films")
    with pytest.raises(InputError, match="some prompts of films end in a line break and others"):
        label_token_ids(TextEncoder(spaced), WORDS, ["a:", "a\n"], "films")
    ids = label_token_ids(TextEncoder(spaced, chat_template=True), WORDS, ["a:", "a\n"], "films")
    assert spaced.decode(ids[0]) == "negative"
