"""Rows beyond a model's positions, and tokens beyond its embeddings, before any weights are loaded."""

import warnings
from types import SimpleNamespace

import pytest
import transformers

from app.models.source import resolve_model
from app.utils.errors import InputError
from data_modules.encoding import TextEncoder
from data_modules.limits import check_encoded, check_max_length
from data_modules.questions import BenchmarkQuestions
from data_modules.rows import TextRow
from tests.support.toy_benchmarks import Choosing, Writing

SIZE = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LEARNT = {
    "gpt2": ("GPT2Config", {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 16, "word_embed_proj_dim": 16}),
    "bart": ("BartConfig", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
    "gptj": (
        "GPTJConfig",
        {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    ),
    # Rows 0 to 2 are of padding.
    "roberta": (
        "RobertaConfig",
        {
            **{"max_position_embeddings": 67, "pad_token_id": 2, "intermediate_size": 16},
            "is_decoder": True,
        },
    ),
}
OTHERS = {
    "llama": ("LlamaConfig", {"intermediate_size": 16}),
    "t5": ("T5Config", {"d_model": 16, "num_layers": 1, "d_ff": 16}),
}


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    """Return `model(kind, **config)`: a model without weights, of 64 positions and 128 embeddings."""

    def make(kind, **settings):
        name, own = {**LEARNT, **OTHERS}[kind]
        place = {} if "n_positions" in own or kind == "t5" else {"max_position_embeddings": 64}
        size = {"vocab_size": 128} if "n_embd" in own or "d_model" in own else SIZE
        config = getattr(transformers, name)(**{**size, **place, **own, **settings})
        config.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        source = resolve_model(str(tmp_path), weights=False)
        encodes = config.is_encoder_decoder
        return SimpleNamespace(
            source=source, config=config, tokenizer=tiny_tokenizer, is_encoder_decoder=encodes
        )

    return make


def encoded(model, *rows, max_length=1000):
    encoder = TextEncoder(model.tokenizer, model.is_encoder_decoder)
    return {"rows train": encoder.rows([TextRow(*row) for row in rows], max_length)[0]}


@pytest.mark.parametrize("kind", LEARNT)
def test_rows_longer_than_a_table_of_positions(kind, model):
    short = model(kind)
    check_max_length(64, short)
    message = (
        r"^--data.max_length=65, but model.name has 64 positions and no more: .*max_length=64$"
    )
    with pytest.raises(InputError, match=message):
        check_max_length(65, short)


@pytest.mark.parametrize("kind", OTHERS)
def test_positions_without_a_table(kind, model):
    rotary = model(kind)
    check_max_length(10**6, rotary)
    rows = encoded(rotary, ("a", "b"), ("a" * 70, "b"), ("a" * 64, "b"), ("a" * 60, "b"))
    if kind == "t5":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_encoded(rows, [], rotary)
        return
    message = r"2 of 4 rows of rows train are longer than the 64 positions .* has 73 tokens"
    with pytest.warns(UserWarning, match=message) as told:
        check_encoded(rows, [], rotary)
    assert len(told) == 1


def test_the_answer_of_an_encoder_decoder_model_has_its_own_positions(model):
    bart = model("bart")
    check_encoded(encoded(bart, ("a", "b" * 63)), [], bart)
    rows = encoded(bart, ("a", "b"), ("a", "b" * 64))
    with pytest.raises(
        InputError, match=r"row 1 of rows train has an answer of 65 tokens.* 64 pos"
    ):
        check_encoded(rows, [], bart)


@pytest.mark.parametrize("where", ["prompt", "answer", "padding", "question", "choice", "nothing"])
def test_tokens_without_an_embedding(where, model, monkeypatch):
    tokenizer = (llama := model("llama")).tokenizer
    llama.config.vocab_size = len(tokenizer)
    tokenizer.add_tokens(["☃"])
    prompt, answer = ("☃" if where == side else "a" for side in ("prompt", "answer"))
    if where == "padding":
        tokenizer.pad_token = "☃"
    if where == "question":
        monkeypatch.setattr("tests.support.toy_benchmarks.FILMS", ("☃",))
    if where == "choice":
        monkeypatch.setattr(Choosing, "choices", ("a", "☃"))
    benchmarks = BenchmarkQuestions([Writing(size=2), Choosing(size=2)], "cut")
    asked = benchmarks.prepare("test", TextEncoder(tokenizer))
    rows = encoded(llama, ("a", "b"), (prompt, answer))
    if where == "nothing":
        check_encoded(rows, asked, llama)
        return
    places = {"padding": "the padding of the tokenizer", "question": "toy/0 of writing"}
    places |= {"prompt": "row 1 of rows train", "answer": "the answer of row 1 of rows train"}
    named = places.get(where, "a choice of choosing")
    size = llama.config.vocab_size
    message = f"^{named} has the token '☃' with the id {size}, but the embedding .* has {size} rows"
    with pytest.raises(InputError, match=message):
        check_encoded(rows, asked, llama)


def test_through_the_command(error_of, tiny_run, run_models, tmp_path, monkeypatch):
    monkeypatch.setattr("app.training.model_building.load_model", None)
    gpt2 = ("fit", "--config", tiny_run, "--model.name", run_models / "gpt2")
    told = error_of(*gpt2, "--data.max_length=2000")
    assert told.startswith("--data.max_length=2000, but model.name has 1024 positions")
    folder = tmp_path / "larger"
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_models / "gpt2")
    tokenizer.add_tokens([f"<{number}>" for number in range(128)] + ["film"])
    tokenizer.save_pretrained(folder)
    transformers.AutoConfig.from_pretrained(run_models / "gpt2").save_pretrained(folder)
    (folder / "model.safetensors").touch()
    told = error_of("fit", "--config", tiny_run, "--model.name", folder)
    assert told.startswith("row 0 of glue/sst2 train has the token 'film' with the id")
