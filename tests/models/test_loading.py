import copy
import json

import gguf
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from app.models import gguf as gguf_files
from app.models import loading as pretrained
from app.models.loading import (
    base_reference,
    load_config,
    load_model,
    load_tokenizer,
    local_directory,
    model_fingerprint,
)
from app.models.source import resolve_model
from app.training.module import LoraModule
from app.utils.errors import InputError


def test_directory(tiny_model_dir, tiny_llama, tiny_tokenizer, capfd, monkeypatch):
    source = resolve_model(str(tiny_model_dir))
    assert (source.kind, source.name) == ("directory", str(tiny_model_dir))
    assert local_directory(source) == tiny_model_dir
    ids = torch.arange(20)[None]
    model = load_model(source)
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert not model.training
    text = "Review: a fine film!\nSentiment: positive\t{1, 2} <b>"
    tokenizer = load_tokenizer(source)
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert load_config(source).num_hidden_layers == 2
    monkeypatch.chdir(tiny_model_dir.parent)
    monkeypatch.setenv("HOME", str(tiny_model_dir.parent))
    for name in (tiny_model_dir.name, f"~/{tiny_model_dir.name}"):
        assert load_config(resolve_model(name)).model_type == "llama"
        assert base_reference(resolve_model(name)) == (str(tiny_model_dir), None)
    assert capfd.readouterr() == ("", "")


def test_encoder_decoder(run_models, tiny_t5):
    model = load_model(resolve_model(str(run_models / "t5")))
    ids = torch.arange(8)[None]
    expected = tiny_t5()(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, expected)


def test_dtype_and_attention(tiny_model_dir, tiny_llama):
    tiny_llama().to(torch.bfloat16).save_pretrained(tiny_model_dir)
    source = resolve_model(str(tiny_model_dir))
    assert {p.dtype for p in load_model(source).parameters()} == {torch.float32}
    model = load_model(source, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("spda", "is unknown"), ("flash_attention_2", "is not installed here, or finds no GPU")],
)
def test_attention_that_does_not_run_here(name, wrong, error_of, tiny_run, monkeypatch):
    monkeypatch.setitem(pretrained.GPU_ATTENTION, "flash_attention_2", lambda: False)
    told = error_of("fit", "--config", tiny_run, f"--model.attn_implementation={name}")
    assert f"attn_implementation='{name}' {wrong}: expected eager" in told
    if "installed" in wrong:  # a comparison may be written for another machine
        LoraModule("no-model", attn_implementation=name)


def test_padding_token_is_the_end_of_text_token_if_need_be(tiny_model_dir, tiny_tokenizer, capfd):
    core = tiny_tokenizer.backend_tokenizer
    unpadded = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    unpadded.save_pretrained(tiny_model_dir)
    for _ in range(2):
        assert load_tokenizer(resolve_model(str(tiny_model_dir))).pad_token == "<eos>"
    assert capfd.readouterr().err.count("no padding token: <eos> pads") == 1


def test_a_sentencepiece_file_alone_is_a_tokenizer(tiny_t5, tmp_path):
    """As the first T5 was published, without tokenizer.json."""
    (tmp_path / "corpus.txt").write_text("classify the text: a good film\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=22,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = tmp_path / "t5"
    tiny_t5().save_pretrained(folder)
    (tmp_path / "spiece.model").rename(folder / "spiece.model")
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for text in ("a good film", "the text: bad"):
        assert tokenizer(text)["input_ids"] == [*oracle.encode(text), oracle.eos_id()]


def test_missing_shard(tiny_model_dir, tiny_llama):
    (tiny_model_dir / "model.safetensors").unlink()
    tiny_llama().save_pretrained(tiny_model_dir, max_shard_size="10KB")
    source = resolve_model(str(tiny_model_dir))
    ids = torch.arange(9)[None]
    assert torch.equal(load_model(source)(ids).logits, tiny_llama()(ids).logits)
    shard = min(tiny_model_dir.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        resolve_model(str(tiny_model_dir))
    (tiny_model_dir / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="a readable model"):
        resolve_model(str(tiny_model_dir))


def test_broken_checkpoints(tiny_model_dir):
    source = resolve_model(str(tiny_model_dir))
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (tiny_model_dir / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lacks 9 weights .* model\.layers\.2\."):
        load_model(source)
    weights = tiny_model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(source)
    (tiny_model_dir / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(InputError, match="no-such-type"):
        load_config(source)


def test_fingerprint_follows_the_weights(tiny_model_dir, tiny_llama):
    source = resolve_model(str(tiny_model_dir))
    first = model_fingerprint(source)
    assert first.startswith("sha256:")
    (tiny_model_dir / "README.md").write_text("not a weight")
    assert model_fingerprint(source) == first
    tiny_llama(seed=1).save_pretrained(tiny_model_dir)
    assert model_fingerprint(source) != first


def test_unreadable_gguf_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_ONE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and rubbish")
    source = resolve_model(str(path))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(source)
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install gguf"):
        load_tokenizer(source)


def test_special_tokens_are_those_that_the_gguf_file_names(tmp_path, tiny_tokenizer):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    first, last = tiny_tokenizer.convert_ids_to_tokens([5, 6])
    writer.add_bos_token_id(5)
    writer.add_eos_token_id(6)
    writer.add_pad_token_id(6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token, tokenizer.pad_token = first, None
    unknown = tokenizer.unk_token
    gguf_files.name_special_tokens(tokenizer, tmp_path / "m.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (first, last, last)
    assert (tokenizer.eos_token_id, tokenizer.unk_token) == (6, unknown)


@pytest.mark.smollm2
def test_smollm2(smollm2_name, smollm2_dir, capfd):
    source = resolve_model(smollm2_name)
    assert local_directory(source) == smollm2_dir
    assert base_reference(source) == (str(smollm2_dir), None)
    assert not list(smollm2_dir.parent.glob("*.part"))
    assert load_tokenizer(source).eos_token == load_tokenizer(source).pad_token == "<|im_end|>"
    model = load_model(source)
    tokenizer = load_tokenizer(source)
    assert capfd.readouterr() == ("", "")
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = tokenizer("Review: a fine film. Sentiment: positive", return_tensors="pt")
    oracle = AutoModelForCausalLM.from_pretrained(**source.load_args, dtype=torch.float32)
    with torch.no_grad():
        logits, expected = model(**batch).logits, oracle(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert tokenizer.decode(model.generate(**batch, max_new_tokens=1, do_sample=False)[0])
