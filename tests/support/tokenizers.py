"""Small trained tokenizers of the two kinds that differ at the start of a word."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ("negative", "positive")
TEXTS = (
    "a good film",
    "bad",
    "it is good , it is bad",
    "the film is a good film it is a good film",
)
CORPUS = [f"classify the text: {text}\nresult: {word}" for text in TEXTS for word in WORDS] * 20


@pytest.fixture(scope="session")
def causal() -> PreTrainedTokenizerFast:
    """Return byte-level BPE as GPT-2 and SmolLM2 have it; pad is eos; nothing is added unasked."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def seq2seq() -> PreTrainedTokenizerFast:
    """Return pieces that mark the start of a word, and an EOS that the tokenizer adds, as T5 has it."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    core.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
