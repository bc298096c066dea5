"""Stop strings end outputs at once, wherever the borders of tokens and characters lie."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from app.models.decoding import Decoding
from app.models.generation import generate
from app.models.loading import load_tokenizer
from app.models.source import resolve_model


def written(model, tokenizer, prompt, tokens, stop=(), new=None):
    """Return the output of a model that writes these tokens, and its number of steps."""
    steps = []

    def script(module, args, kwargs, out):
        out.logits = torch.zeros_like(out.logits)
        out.logits[:, -1, tokens[len(steps)]] = 1.0
        steps.append(1)
        return out

    handle = model.register_forward_hook(script, with_kwargs=True)
    decoding = Decoding(new or len(tokens), stop=stop)
    ((output,),) = generate(model, model, tokenizer, [prompt], ["row"], decoding)
    handle.remove()
    assert output.num_tokens == len(steps)
    return output


@pytest.fixture
def writes(tiny_llama, tiny_tokenizer):
    """Return `writes(text, stop, prompt="2+2")`, whose tokens are the characters of the text."""

    def write(text, stop, prompt="2+2"):
        ids = tiny_tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        prompt_ids = tiny_tokenizer(prompt)["input_ids"]
        return written(tiny_llama(), tiny_tokenizer, prompt_ids, ids, stop)

    return write


@pytest.mark.parametrize(
    ("text", "stop", "kept", "tokens"),
    [
        ("four.\nQ: and now", ["\nQ:"], "four.", 8),
        ("four.\nQ: and now", ["Q:", "\n"], "four.", 6),
        ("four.\nQ: and now", ["Q: a", ":"], "four.\nQ", 8),
        ("\n\nfour", ["\n\n"], "", 2),
        ("four", ["four"], "", 4),
        ("fofour", ["four"], "fo", 6),
        ("aaab", ["ab", "aab", "zz"], "a", 4),
        ("x" * 40 + "stop" + "y" * 9, ["stop", "s" * 30], "x" * 40, 44),
    ],
)
def test_an_output_is_cut_before_the_first(text, stop, kept, tokens, writes):
    output = writes(text, stop)
    assert (output.text, output.num_tokens, output.finished) == (kept, tokens, True)


@pytest.mark.parametrize("stop", [(), ["Q:"], ["2+2="], ["=4 "]])
def test_the_prompt_does_not_count(stop, writes):
    output = writes("=4", stop, prompt="Q:2+2")
    assert (output.text, output.num_tokens, output.finished) == ("=4", 2, False)


def test_special_tokens_stop_by_their_names_and_are_not_text(tiny_llama, tiny_tokenizer):
    prompt, bos = [50], tiny_tokenizer.bos_token_id
    four = tiny_tokenizer("four")["input_ids"]
    script = [*four, bos, *four]
    model = tiny_llama()
    output = written(model, tiny_tokenizer, prompt, script, stop=["<bos>"])
    assert (output.text, output.num_tokens, output.finished) == ("four", 5, True)
    output = written(model, tiny_tokenizer, prompt, script)
    assert (output.text, output.num_tokens, output.finished) == ("fourfour", 9, False)


@pytest.mark.smollm2
def test_characters_of_several_tokens(smollm2_dir, tiny_llama):
    """A byte-level tokenizer writes many a character in pieces, and many characters at once."""
    tokenizer = load_tokenizer(resolve_model(str(smollm2_dir)))
    text = "  Ünïcode é! “quotes” 🦆🦆 ducks。\n\ndef f(x):\n    return x  # 好。<|im_start|>"
    tokens = tokenizer(text)["input_ids"]
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=2)
    prompt = tokenizer("naïve 🦆")["input_ids"]
    whole = [tokenizer.decode(tokens[:number]) for number in range(1, len(tokens) + 1)]
    assert any("�" in part for part in whole)
    for stop in ("。", "é!", "🦆", " 🦆", "\n\n", "def", "ducks", "<|im_start|>"):
        output = written(model, tokenizer, prompt, tokens, [stop])
        first = next(number for number, part in enumerate(whole, 1) if stop in part)
        assert (output.num_tokens, output.finished) == (first, True), stop
        assert output.text == text[: text.index(stop)], stop


def sentencepiece():
    """Return a tokenizer as LLaMA-2's: words with a mark in front, other characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁▁▁", "▁The", "▁return", "▁x", "Q", ":", "x", "A"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return fast, vocabulary


@pytest.mark.parametrize(
    ("prompt", "pieces", "stop", "text", "tokens"),
    [
        ("A :", "▁The ▁x", [], " The x", 2),
        ("A :", "▁The ▁x", [" x"], " The", 2),
        ("A :", "▁x ▁The", [" x"], "", 1),
        ("A <0x0A>", "▁▁▁ ▁return ▁x <0x0A> Q : x", ["\nQ:"], "    return x", 6),
        ("A <0x0A>", "▁▁▁ ▁return ▁x <0x0A> Q : x", [" return"], "   ", 2),
        ("A ▁", "x ▁x", [], "x x", 2),
        ("A :", "x <0xE2> <0x82> <0xAC> x", ["€"], "x", 4),
        ("A :", "x <0xE2> <0x82> <0xAC> x", ["€x"], "x", 5),
        ("<s>", "▁The ▁x", [], "The x", 2),
    ],
)
def test_the_first_space_of_a_continuation(prompt, pieces, stop, text, tokens, tiny_llama):
    """Decoded alone it would be lost, and with it the indentation of code."""
    tokenizer, vocabulary = sentencepiece()
    model = tiny_llama(vocab_size=len(vocabulary), eos_token_id=2)
    prompt_ids = [vocabulary[piece] for piece in prompt.split()]
    script = [vocabulary[piece] for piece in pieces.split()]
    output = written(model, tokenizer, prompt_ids, script, stop)
    assert (output.text, output.num_tokens, output.finished) == (text, tokens, bool(stop))


def test_spaces_before_punctuation_stay(tiny_llama, tiny_tokenizer):
    """Code is not prose, whatever the tokenizer's settings ask for."""
    tiny_tokenizer.clean_up_tokenization_spaces = True
    tiny_tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    tokens = tiny_tokenizer("x = y . z , 1 != 2")["input_ids"]
    assert tiny_tokenizer.decode(tokens) != "x = y . z , 1 != 2"
    output = written(tiny_llama(), tiny_tokenizer, [5], tokens)
    assert output.text == "x = y . z , 1 != 2"


def test_the_search_does_not_grow_with_the_output(tiny_llama, tiny_tokenizer, monkeypatch):
    lengths, decode = [], tiny_tokenizer.decode
    monkeypatch.setattr(
        tiny_tokenizer, "decode", lambda ids, **o: (lengths.append(len(ids)), decode(ids, **o))[1]
    )
    tokens = tiny_tokenizer("x" * 300)["input_ids"]
    written(tiny_llama(), tiny_tokenizer, [5], tokens, stop=["stop", "no"])
    assert max(lengths[:-2]) <= len("stop") + 1
    assert len(lengths) <= 2 * 300 + 2
